"""Metrics of images and classifiers."""

from tokenlearn.metrics.class_accuracy import ClassAccuracy, wilson_interval
from tokenlearn.metrics.diversity import coverage, covered, expected_coverage, pairwise_distance, relative_diversity
from tokenlearn.metrics.group_features import GroupFeatures
from tokenlearn.metrics.intervals import (
    bootstrap_interval,
    holm_levels,
    share_difference_interval,
    share_difference_p_value,
    student_interval,
    two_way_bootstrap_interval,
)
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
    "GroupFeatures",
    "KernelDistances",
    "NeuralCollapse",
    "bootstrap_interval",
    "coverage",
    "covered",
    "equiangularity",
    "equinorm",
    "expected_coverage",
    "holm_levels",
    "kernel_distance",
    "maximal_angle",
    "nearest_centre_disagreement",
    "pairwise_distance",
    "perceptual_distance",
    "rank_correlation",
    "relative_diversity",
    "self_duality",
    "share_difference_interval",
    "share_difference_p_value",
    "student_interval",
    "timed",
    "two_way_bootstrap_interval",
    "wilson_interval",
    "within_class_variability",
]
