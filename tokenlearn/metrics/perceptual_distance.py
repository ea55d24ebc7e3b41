"""How different two pictures look to a network."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def perceptual_distance(features: Tensor, others: Tensor) -> Tensor:
    """Distance of pictures in the features of a network's trunk.

    The unweighted form of LPIPS (Zhang et al., 2018, https://arxiv.org/abs/1801.03924, equation 1): features are
    normalised at every place, and squared differences averaged over places.

    Args:
        features: (B, P, F) features at P places.
        others: the same of the pictures to compare with.

    Returns:
        (B,) in [0, 4], 0 for the same features.
    """
    difference = functional.normalize(features, dim=-1) - functional.normalize(others, dim=-1)
    return difference.square().sum(dim=-1).mean(dim=-1)
