"""Metrics of images and classifiers."""

from tokenlearn.metrics.class_accuracy import ClassAccuracy, wilson_interval
from tokenlearn.metrics.kernel_distance import KernelDistances, kernel_distance
from tokenlearn.metrics.neural_collapse import (
    CollapseStatistics,
    NeuralCollapse,
    equiangularity,
    equinorm,
    maximal_angle,
    nearest_centre_disagreement,
    self_duality,
    within_class_variability,
)
from tokenlearn.metrics.perceptual_distance import perceptual_distance
from tokenlearn.metrics.rank_correlation import rank_correlation
from tokenlearn.metrics.timing import timed

__all__ = [
    "ClassAccuracy",
    "CollapseStatistics",
    "KernelDistances",
    "NeuralCollapse",
    "equiangularity",
    "equinorm",
    "kernel_distance",
    "maximal_angle",
    "nearest_centre_disagreement",
    "perceptual_distance",
    "rank_correlation",
    "self_duality",
    "timed",
    "wilson_interval",
    "within_class_variability",
]
