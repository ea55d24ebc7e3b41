"""Mean scores of groups of images."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class GroupScores(Metric):
    """Sum and number of the scores of each of several groups of images, over any number of processes.

    Scores that are 0 or 1 add up exactly.

    Args:
        num_groups: number of groups, such as classes.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(num_groups), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(num_groups), dist_reduce_fx="sum")

    def update(self, scores: Tensor, groups: Tensor) -> None:
        """Add the scores of a batch.

        Args:
            scores: (B,) floating-point scores.
            groups: (B,) index of each image's group.
        """
        self.sums.index_add_(0, groups, scores.to(self.sums))
        self.counts.index_add_(0, groups, torch.ones_like(scores, dtype=self.counts.dtype))

    def compute(self) -> Tensor:
        """Sum and number of scores (num_groups, 2)."""
        return torch.stack([self.sums, self.counts], dim=1)
