"""How much images differ from each other, and how much of the real images they cover."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pairwise_distance(features: Tensor) -> Tensor:
    """Mean Euclidean distance of all pairs of images, in the features of a frozen network.

    Args:
        features: (N, F) of N images.

    Returns:
        () float64, NaN for fewer than two images.
    """
    # By differences of rows, not by torch.cdist: its matrix products lose the small distances.
    return torch.pdist(features.double()).mean()


def relative_diversity(features: Tensor, reference: Tensor) -> Tensor:
    """Mean pairwise distance of images over that of real images of the same class.

    Args:
        features: (M, F) of M images.
        reference: (N, F) of N real images.

    Returns:
        () float64: 1 for images as different as real ones, 0 for one image again and again, NaN for fewer than two
        images of either kind.
    """
    return pairwise_distance(features) / pairwise_distance(reference)


def covered(features: Tensor, reference: Tensor, neighbours: int = 5) -> Tensor:
    """Near which real images there is an image.

    A real image's ball reaches to its k-th nearest real image, and is covered if an image lies in it (Naeem et al.,
    2020, https://arxiv.org/abs/2002.09797, section 3).

    Args:
        features: (M, F) of M images.
        reference: (N, F) of N real images, more than ``neighbours``.
        neighbours: k.

    Returns:
        (N,) bool.

    Raises:
        ValueError: if there are too few real images, or no image.
    """
    if not 0 < neighbours < len(reference) or not len(features):
        raise ValueError(
            f"coverage with {neighbours} neighbours of {len(features)} images by {len(reference)} real ones"
        )
    real = reference.double()
    exact = "donot_use_mm_for_euclid_dist"
    # The nearest real image is the image itself.
    radii = torch.cdist(real, real, compute_mode=exact).kthvalue(neighbours + 1, dim=1).values
    nearest = torch.cdist(real, features.double(), compute_mode=exact).min(dim=1).values
    return nearest <= radii


def coverage(features: Tensor, reference: Tensor, neighbours: int = 5) -> Tensor:
    """Share of real images near which there is an image, () float64; arguments and errors as of :func:`covered`."""
    return covered(features, reference, neighbours).double().mean()


def expected_coverage(images: int, real: int, neighbours: int = 5) -> float:
    """Mean :func:`coverage` of N real images by M images of the same distribution, 0.97 for many of both and k = 5.

    It is ``1 - (N - 1)...(N - k) / ((M + N - 1)...(M + N - k))``.

    Args:
        images: M.
        real: N.
        neighbours: k.
    """
    return 1 - math.prod((real - place) / (images + real - place) for place in range(1, neighbours + 1))
