"""One step of the optimisation of latents that sampling starts from.

DOODL (Wallace et al., 2023, https://arxiv.org/abs/2303.13703) descends the gradient ``g`` of a loss of the finished
picture by the latents ``x`` that its sampling starts from,

    g <- clip(s g, -c, c)           element by element, after the scale s
    b <- m b + g                    momentum
    x <- x - b + d n                with a perturbation n of standard normal noise
    x <- x |x_0| / |x|              at the norm of the first latents, or in each band of spatial frequencies

in this order, which is the released code's. Clipping comes before momentum, so that a step is at most ``c / (1 - m)``
for each element, ten times the limit at the usual ``m`` of 0.9. There ``s`` is called ``grad_scale``; its gradient is
half of the one of the mean loss of EDICT's two pictures, which is what our chains give, so that a published scale
means half of it here. Where all elements reach the limit, as with most published settings, that is the same.
"""

from __future__ import annotations

from collections.abc import Callable

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


def keep_norm(first: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that scales latents to the norms that the first ones have.

    Normal noise of many elements has nearly one norm, and the model has seen no other.

    Args:
        first: (..., C, h, w).
    """
    norms = latent_norms(first)
    return lambda latents: latents * (norms / latent_norms(latents))


def keep_band_norms(first: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that scales latents to the norms that the first ones have in each band of each channel.

    Normal noise has the same strength at all frequencies. A gradient has most of its own at the low ones, which are
    few, so that under one norm alone they come to outweigh the others: flat, glaring colours that the model never
    started from. Bands are the mean, and octaves of the spatial frequency.

    Args:
        first: (..., C, h, w).
    """
    bands = _octaves(*first.shape[-2:]).to(first.device)
    _, norms = _spectrum(first, bands)

    def kept(latents: Tensor) -> Tensor:
        spectrum, own = _spectrum(latents, bands)
        factors = norms / own.clamp(min=torch.finfo(own.dtype).eps)
        scaled = spectrum * factors[..., bands.flatten()].reshape(spectrum.shape)
        restored: Tensor = torch.fft.ifft2(scaled, norm="ortho").real.to(latents)
        return restored

    return kept


def _octaves(height: int, width: int) -> Tensor:
    """Band (height, width) of each frequency: 0 for the mean, 1 up to one wave across a picture, 2 up to two."""
    down, right = torch.fft.fftfreq(height) * height, torch.fft.fftfreq(width) * width
    waves = torch.hypot(down[:, None], right[None])
    return torch.where(waves == 0, 0, waves.clamp(min=1).log2().ceil() + 1).long()


def _spectrum(latents: Tensor, bands: Tensor) -> tuple[Tensor, Tensor]:
    """Fourier transform (..., h, w) of latents (..., h, w), and its norms (..., K) in K bands."""
    spectrum = torch.fft.fft2(latents.to(torch.promote_types(latents.dtype, torch.float32)), norm="ortho")
    energy = spectrum.abs().square().flatten(-2)
    norms = energy.new_zeros(*latents.shape[:-2], int(bands.max()) + 1).index_add(-1, bands.flatten(), energy)
    return spectrum, norms.sqrt()


def optimisation_step(
    latents: Tensor,
    gradient: Tensor,
    buffer: Tensor,
    grad_scale: float = 1.0,
    clip: float | None = 1e-3,
    momentum: float = 0.9,
    perturbation: Tensor | None = None,
    renormalise: Callable[[Tensor], Tensor] | None = None,
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
        renormalise: what every step ends with, such as :func:`keep_norm`; None to let norms go.

    Returns:
        (..., C, h, w) latents and the momentum to give to the next step.
    """
    buffer = momentum * buffer + clip_elements(grad_scale * gradient, clip)
    latents = latents - buffer
    if perturbation is not None:
        latents = latents + perturbation
    return latents if renormalise is None else renormalise(latents), buffer
