"""Metrics as torchmetrics modules, with their intervals."""

from tokenlearn.metrics.class_accuracy import ClassAccuracy, is_classified_as, wilson_interval
from tokenlearn.metrics.report import Report

__all__ = ["ClassAccuracy", "Report", "is_classified_as", "wilson_interval"]
