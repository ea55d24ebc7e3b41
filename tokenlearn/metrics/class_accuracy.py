"""Shares of images that a classifier takes for the wanted class."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric


def is_classified_as(logits: Tensor, targets: Tensor, multi_label: bool) -> Tensor:
    """Whether each image is taken for its target class.

    Args:
        logits: (B, K).
        targets: (B,) class indices.
        multi_label: independent sigmoids (then the target's logit must be positive) instead of one softmax (then it
            must be the largest).

    Returns:
        (B,) bool.
    """
    if multi_label:
        return logits.gather(1, targets[:, None])[:, 0] > 0
    return logits.argmax(dim=1) == targets


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """95 % interval of a share, in [0, 1], that also holds near 0 and 1 (Wilson, 1927).

    Returns:
        Lower and upper end; (0, 1) where nothing was counted.
    """
    if total == 0:
        return 0.0, 1.0
    z = 1.959964
    share = successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # Rounding must not put the share itself outside.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


class ClassAccuracy(Metric):
    """Accuracy of each of several groups of images, exact over any number of processes.

    Args:
        num_groups: number of groups, for instance classes times kinds of prompt.
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
