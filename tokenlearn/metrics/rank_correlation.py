"""Rank correlation of a judge's logit with the scale of an edit."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.functional.regression import spearman_corrcoef

from tokenlearn.metrics.group_means import GroupMeans


class ScaleRanks(nn.Module):
    """Mean of Spearman's correlation of each picture's logit with the scale it was edited at, by groups.

    ``rank_correlation`` is over the side of the scale that a picture needs: where the judge is sure already there is
    little to rank, so both sides together are a figure of their own, ``both_sides_rank_correlation``.

    Args:
        num_groups: number of groups, for instance attributes.
    """

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.needed, self.both_sides = GroupMeans(num_groups), GroupMeans(num_groups)

    def update(self, logits: Tensor, scales: Tensor, shown: Tensor, group: int) -> None:
        """Add pictures, each edited at several scales; a side of fewer than two scales does not count.

        Args:
            logits: (B, S).
            scales: (B, S), positive where the attribute was added.
            shown: (B,) whether a picture shows the attribute unedited, and needs negative scales.
            group: index of their group.
        """
        cell = torch.tensor([group], device=logits.device)
        for own, tried, present in zip(logits, scales, shown.tolist(), strict=True):
            needed = tried <= 0 if present else tried >= 0
            for metric, used in ((self.needed, needed), (self.both_sides, torch.ones_like(needed))):
                if used.sum() > 1:
                    metric.update(spearman_corrcoef(own[used], tried[used])[None], cell)

    def compute(self) -> dict[str, Tensor]:
        """Means (num_groups,) by name, NaN for groups without a value."""
        metrics = {"rank_correlation": self.needed, "both_sides_rank_correlation": self.both_sides}
        # One group alone comes without a dimension.
        return {name: metric.compute().reshape(-1) for name, metric in metrics.items()}
