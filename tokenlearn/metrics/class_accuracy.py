"""Accuracies of groups of images, and the interval of a share."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor
from torchmetrics import Metric


def wilson_interval(successes: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a share, which also holds near 0 and 1 (Wilson, 1927).

    Args:
        successes: number of successes.
        total: number of trials.
        level: share of samples whose interval holds the share.

    Returns:
        Lower and upper end in [0, 1]; (0, 1) without trials.
    """
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # Rounding must not leave the share outside of its interval.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


class ClassAccuracy(Metric):
    """Accuracy of each of several groups of images, exact over any number of processes.

    Args:
        num_groups: number of groups, such as classes times kinds of prompt.
    """

    full_state_update = False
    higher_is_better = True
    correct: Tensor
    total: Tensor

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros(num_groups, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(num_groups, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, correct: Tensor, groups: Tensor) -> None:
        """Count a batch.

        Args:
            correct: (B,) bool.
            groups: (B,) index of each image's group.
        """
        self.correct.index_add_(0, groups, correct.long())
        self.total.index_add_(0, groups, torch.ones_like(groups))

    def compute(self) -> Tensor:
        """Counts (num_groups, 2): correct, total."""
        return torch.stack([self.correct, self.total], dim=1)
