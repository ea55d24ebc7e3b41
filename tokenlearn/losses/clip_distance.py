"""Distance between directions in the space of CLIP."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def mean_direction(features: Tensor) -> Tensor:
    """Renormalised mean of unit features: one target out of several pictures or several wordings.

    It is the direction with the greatest mean cosine to all of them. DOODL (Wallace et al., 2023,
    https://arxiv.org/abs/2303.13703) personalises with that of a few pictures; CLIP (Radford et al., 2021,
    https://arxiv.org/abs/2103.00020, section 3.1.4) classifies with that of many prompts of a class.

    Args:
        features: (..., N, D) unit vectors.

    Returns:
        (..., D) unit vector; zeros where they cancel each other exactly.
    """
    return functional.normalize(features.mean(dim=-2), dim=-1)


def spherical_distance(features: Tensor, targets: Tensor) -> Tensor:
    """Half of the squared angle between unit vectors, per sample: the CLIP loss of DOODL.

    ``2 arcsin^2(||u - v|| / 2)``, for pictures against a text or against other pictures (Wallace et al., 2023,
    https://arxiv.org/abs/2303.13703). Unlike one minus the cosine it keeps its slope far from the target. The gradient
    is finite everywhere, and zero where the vectors are equal or opposite.

    Args:
        features: (B, D) unit vectors u.
        targets: (D,) or (B, D) unit vectors v; of several targets, :func:`mean_direction`.

    Returns:
        (B,) losses in [0, pi^2 / 2], not reduced.
    """
    half_chord: Tensor = torch.linalg.vector_norm(features - targets.to(features), dim=-1) / 2
    # Rounding can take the chord of opposite vectors past the diameter, where the arcsine has no value; at the
    # diameter itself its slope is infinite.
    below_one = 1 - torch.finfo(half_chord.dtype).eps
    return 2 * half_chord.clamp(max=below_one).arcsin().square()
