"""Means of several groups of values."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class GroupMeans(Metric):
    """Mean of each of several groups of values, over any number of processes.

    Args:
        num_groups: number of groups, for instance attributes times strengths.
    """

    full_state_update = False
    sums: Tensor
    total: Tensor

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(num_groups), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(num_groups, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, values: Tensor, groups: Tensor) -> None:
        """Add a batch; values that are not finite do not count.

        Args:
            values: (B,).
            groups: (B,) index of each value's group.
        """
        counted = values.isfinite()
        self.sums.index_add_(0, groups[counted], values[counted].to(self.sums))
        self.total.index_add_(0, groups[counted], torch.ones_like(groups[counted]))

    def compute(self) -> Tensor:
        """Means (num_groups,), NaN for groups without a value."""
        return self.sums / self.total
