"""Kernel distance of images to real images in the features of a network."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.image.kid import poly_kernel

from tokenlearn.metrics.group_features import FeaturesByGroup


def kernel_distance(features: Tensor, reference: Tensor) -> Tensor:
    """Kernel inception distance of two samples, the unbiased estimate from all of both.

    Squared maximum mean discrepancy under the kernel ``(x.y / F + 1)^3`` (Binkowski et al., 2018,
    https://arxiv.org/abs/1801.01401, equation 4). torchmetrics averages over random subsets of one size; this estimate
    is deterministic, and suits few images and many references.

    Args:
        features: (M, F) of M images, at least 2.
        reference: (N, F) of N real images, at least 2.

    Returns:
        () float64, 0 on average for samples of one distribution; it can be negative.
    """
    features, reference = features.double(), reference.double()
    within, within_reference = (
        (kernel.sum() - kernel.diagonal().sum()) / (len(kernel) * (len(kernel) - 1))
        for kernel in (poly_kernel(features, features), poly_kernel(reference, reference))
    )
    return within + within_reference - 2 * poly_kernel(features, reference).mean()


class KernelDistances(FeaturesByGroup):
    """:func:`kernel_distance` of several groups of images to one reference, over any number of processes.

    Args:
        num_groups: number of groups.
        reference: (N, F) features of real images, the same in all processes.
    """

    reference: Tensor

    def __init__(self, num_groups: int, reference: Tensor) -> None:
        super().__init__(num_groups)
        self.register_buffer("reference", reference, persistent=False)

    def compute(self) -> Tensor:
        """Distances (num_groups,), NaN for groups of fewer than two images."""
        distances = torch.full((self.num_groups,), torch.nan, dtype=torch.double, device=self.reference.device)
        for group, features in enumerate(self.by_group()):
            if len(features) > 1:
                distances[group] = kernel_distance(features, self.reference)
        return distances
