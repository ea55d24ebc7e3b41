"""One step of the optimisation of latents that sampling starts from.

DOODL (Wallace et al., 2023, https://arxiv.org/abs/2303.13703) descends the gradient ``g`` of a loss of the finished
picture by the latents ``x`` that its sampling starts from,

    g <- clip(s g, -c, c)           element by element, after the scale s
    b <- m b + g                    momentum
    x <- x - b + d n                with a perturbation n of standard normal noise
    x <- x |x_0| / |x|              at the norm of the first latents

in this order, which is the released code's. Clipping comes before momentum, so that a step is at most ``c / (1 - m)``
for each element, ten times the limit at the usual ``m`` of 0.9. There ``s`` is called ``grad_scale``; its gradient is
half of the one of the mean loss of EDICT's two pictures, which is what our chains give, so that a published scale
means half of it here. Where all elements reach the limit, as with most published settings, that is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clip_elements(gradient: Tensor, limit: float | None) -> Tensor:
    """Each element in [-limit, limit]; unlike a clipped norm it keeps steps even where few elements have all of it."""
    return gradient if limit is None else gradient.clamp(-limit, limit)


def latent_norms(latents: Tensor) -> Tensor:
    """L2 norm of each sample's latents.

    Args:
        latents: (..., C, h, w).

    Returns:
        (..., 1, 1, 1).
    """
    norms: Tensor = torch.linalg.vector_norm(latents, dim=(-3, -2, -1), keepdim=True)
    return norms


def renormalise(latents: Tensor, norms: Tensor) -> Tensor:
    """Latents (..., C, h, w) scaled to given norms (..., 1, 1, 1).

    Normal noise of many elements has nearly one norm, and the model has seen no other.
    """
    return latents * (norms / latent_norms(latents))


def optimisation_step(
    latents: Tensor,
    gradient: Tensor,
    buffer: Tensor,
    grad_scale: float = 1.0,
    clip: float | None = 1e-3,
    momentum: float = 0.9,
    perturbation: Tensor | None = None,
    norms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of descent; see the module for its parts and their order.

    Args:
        latents: (..., C, h, w) ``x``.
        gradient: (..., C, h, w) gradient of the loss.
        buffer: (..., C, h, w) ``b`` of the step before, zeros at first.
        grad_scale: ``s``, the learning rate.
        clip: ``c``; None for no limit.
        momentum: ``m`` in [0, 1).
        perturbation: (..., C, h, w) ``d n``; None for none.
        norms: (..., 1, 1, 1) norms to keep, of :func:`latent_norms`; None to let them go.

    Returns:
        (..., C, h, w) latents and the momentum to give to the next step.
    """
    buffer = momentum * buffer + clip_elements(grad_scale * gradient, clip)
    latents = latents - buffer
    if perturbation is not None:
        latents = latents + perturbation
    return latents if norms is None else renormalise(latents, norms), buffer
