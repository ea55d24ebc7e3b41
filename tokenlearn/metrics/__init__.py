"""Metrics as torchmetrics modules, with their intervals."""

from tokenlearn.metrics.class_accuracy import ClassAccuracy, is_classified_as, wilson_interval
from tokenlearn.metrics.neural_collapse import (
    CollapseStatistics,
    NeuralCollapse,
    equiangularity,
    equinorm,
    self_duality,
    within_class_variability,
)
from tokenlearn.metrics.report import Report

__all__ = [
    "ClassAccuracy",
    "CollapseStatistics",
    "NeuralCollapse",
    "Report",
    "equiangularity",
    "equinorm",
    "is_classified_as",
    "self_duality",
    "wilson_interval",
    "within_class_variability",
]
