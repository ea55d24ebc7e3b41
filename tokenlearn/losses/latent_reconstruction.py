"""Reconstruction error of latents."""

from __future__ import annotations

from torch import Tensor


def latent_reconstruction(predicted: Tensor, latents: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error in latent space, per sample.

    The reconstruction loss of CASO (https://arxiv.org/abs/2505.14254) between the one-step prediction of the clean
    latents and the latents of the image. An image without the target class has to change, so a weight can be 1 for
    images that already show the class and 0 for the others.

    Args:
        predicted: (B, C, h, w) predicted clean latents.
        latents: (B, C, h, w) latents of the images.
        weights: (B,) bool or factor of each sample; None for 1.

    Returns:
        (B,) losses, not reduced; a mean over the batch includes samples of weight 0.
    """
    errors = (predicted - latents).square().flatten(1).mean(dim=1)
    return errors if weights is None else errors * weights
