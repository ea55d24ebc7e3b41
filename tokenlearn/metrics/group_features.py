"""Features of groups of images."""

from __future__ import annotations

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class FeaturesByGroup(Metric):
    """A metric that collects features of the images of each of several groups, over any number of processes.

    Args:
        num_groups: number of groups, such as classes.
    """

    full_state_update = False
    features: list[Tensor]
    groups: list[Tensor]

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("groups", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, groups: Tensor) -> None:
        """Add the features of a batch.

        Args:
            features: (B, F).
            groups: (B,) index of each image's group.
        """
        self.features.append(features)
        self.groups.append(groups)

    def by_group(self) -> list[Tensor]:
        """Features (N, F) of each group; none before the first image."""
        if not len(self.groups):  # a list, or one tensor after synchronisation of processes
            return []
        features, groups = dim_zero_cat(self.features), dim_zero_cat(self.groups)
        return [features[groups == group] for group in range(self.num_groups)]


class GroupFeatures(FeaturesByGroup):
    """The features themselves."""

    def compute(self) -> list[Tensor]:
        """Features (N, F) of each group; none before the first image."""
        return self.by_group()
