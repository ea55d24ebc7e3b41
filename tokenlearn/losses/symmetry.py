"""Left-right asymmetry of images."""

from __future__ import annotations

from torch import Tensor


def mirror_error(images: Tensor) -> Tensor:
    """Mean squared error between an image and its left-right mirror image, per sample.

    The symmetry loss in the released code of DOODL (Wallace et al., 2023, https://arxiv.org/abs/2303.13703). It needs
    no model, so it shows whether an optimisation works at all.

    Args:
        images: (B, C, H, W) in [0, 1].

    Returns:
        (B,) losses in [0, 1], not reduced.
    """
    return (images - images.flip(-1)).square().flatten(1).mean(dim=1)
