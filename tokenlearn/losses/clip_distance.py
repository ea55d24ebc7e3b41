"""Distance between directions in CLIP's feature space."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def mean_direction(features: Tensor) -> Tensor:
    """Renormalised mean of unit vectors: the direction with the largest mean cosine to all of them.

    DOODL (Wallace et al., 2023, https://arxiv.org/abs/2303.13703) personalises with the mean direction of a few
    images. CLIP (Radford et al., 2021, https://arxiv.org/abs/2103.00020, section 3.1.4) classifies with the mean
    direction of many prompts of a class.

    Args:
        features: (..., N, D) unit vectors.

    Returns:
        (..., D) unit vectors; zeros where the vectors cancel exactly.
    """
    return functional.normalize(features.mean(dim=-2), dim=-1)


def spherical_distance(features: Tensor, targets: Tensor) -> Tensor:
    """Half of the squared angle between unit vectors, per sample: the CLIP loss of DOODL.

    ``2 arcsin^2(||u - v|| / 2)`` between an image and a text or another image (Wallace et al., 2023,
    https://arxiv.org/abs/2303.13703). Unlike one minus the cosine, its slope does not vanish far from the target. The
    gradient is finite everywhere, and zero where the vectors are equal or opposite.

    Args:
        features: (..., D) unit vectors u.
        targets: (..., D) unit vectors v, broadcast against ``features``; for one target out of several, see
            :func:`mean_direction`.

    Returns:
        (...) losses in [0, pi^2 / 2], not reduced.
    """
    half_chord: Tensor = torch.linalg.vector_norm(features - targets.to(features), dim=-1) / 2
    # Rounding can make the chord of opposite vectors longer than the diameter, where the arcsine is undefined; at the
    # diameter its slope is infinite.
    below_one = 1 - torch.finfo(half_chord.dtype).eps
    return 2 * half_chord.clamp(max=below_one).arcsin().square()
