"""Metrics as torchmetrics modules, with their intervals."""

from tokenlearn.metrics.class_accuracy import ClassAccuracy, is_classified_as, wilson_interval
from tokenlearn.metrics.group_means import GroupMeans
from tokenlearn.metrics.kernel_distance import KernelDistances, kernel_distance
from tokenlearn.metrics.neural_collapse import (
    CollapseStatistics,
    NeuralCollapse,
    equiangularity,
    equinorm,
    self_duality,
    within_class_variability,
)
from tokenlearn.metrics.perceptual_distance import perceptual_distance
from tokenlearn.metrics.report import PictureRows, Report, interval_cells, interval_columns, is_share, mean_share
from tokenlearn.metrics.scale_ranks import ScaleRanks
from tokenlearn.metrics.timing import timed

__all__ = [
    "ClassAccuracy",
    "CollapseStatistics",
    "GroupMeans",
    "KernelDistances",
    "NeuralCollapse",
    "PictureRows",
    "Report",
    "ScaleRanks",
    "equiangularity",
    "equinorm",
    "interval_cells",
    "interval_columns",
    "is_classified_as",
    "is_share",
    "kernel_distance",
    "mean_share",
    "perceptual_distance",
    "self_duality",
    "timed",
    "wilson_interval",
    "within_class_variability",
]
