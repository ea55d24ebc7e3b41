"""Distance of two images in the features of a network."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def perceptual_distance(features: Tensor, others: Tensor) -> Tensor:
    """Distance of images in the features of a network's trunk.

    The unweighted form of LPIPS (Zhang et al., 2018, https://arxiv.org/abs/1801.03924, equation 1): features are
    normalised at every position, and squared differences averaged over positions.

    Args:
        features: (B, P, F) features at P positions.
        others: (B, P, F) features of the images to compare with.

    Returns:
        (B,) in [0, 4], 0 for equal features.
    """
    difference = functional.normalize(features, dim=-1) - functional.normalize(others, dim=-1)
    return difference.square().sum(dim=-1).mean(dim=-1)
