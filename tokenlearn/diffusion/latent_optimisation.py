"""Update of latents that sampling starts from, by the gradient of a loss of the finished image.

DOODL (Wallace et al., 2023, https://arxiv.org/abs/2303.13703) descends the gradient ``g`` of a loss of the finished
image by the latents ``x`` that its sampling starts from,

    g <- clip(s g, -c, c)           element by element, after the scale s
    b <- m b + g                    momentum
    x <- x - b + d n                with a perturbation n of standard normal noise
    x <- x |x_0| / |x|              at the norm of the first latents, or in each band of spatial frequencies

in this order, which is that of the released code. Clipping comes before momentum, so an update is at most
``c / (1 - m)`` in each element, ten times the limit at the usual ``m`` of 0.9. The released code calls ``s``
``grad_scale``. Its gradient is half the gradient of the mean loss of EDICT's two images, which this package uses, so
half of a published scale is the same here. Where all elements reach the limit, as with most published settings, the
scale makes no difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenlearn.errors import UserError, check_at_least


@dataclass(frozen=True)
class LatentOptimisation:
    """Settings of the optimisation of latents; defaults are those of DOODL's released code but for ``grad_scale``.

    Attributes:
        steps: number of updates.
        grad_scale: learning rate; it comes before the clip. The released 1 is 0.5 here.
        clip: largest magnitude of the scaled gradient in any element; null for no limit.
        momentum: share of the last update that an update keeps, in [0, 1).
        noise: standard deviation of the perturbation that every update ends with; the same for both latents of a pair,
            as in the released code, since different ones would drive the pair apart.
        renormalise: what is preserved of the first latents: their ``norm`` as published; the norms of their ``bands``
            of spatial frequencies, which keeps colours in bounds under large steps; or null for nothing, as published
            for photos.
        from_timestep: noise level whose latents are optimised, one of the sampling steps'; null for the first. Earlier
            steps stay as they are, and photos are inverted up to it: a lower level changes less.

    Raises:
        UserError: if a number is out of range.
    """

    steps: int = 50
    grad_scale: float = 1.0
    clip: float | None = 1e-3
    momentum: float = 0.9
    noise: float = 1e-4
    renormalise: Literal["norm", "bands"] | None = "norm"
    from_timestep: int | None = None

    def __post_init__(self) -> None:
        check_at_least("optimisation", 1, steps=self.steps)
        check_at_least("optimisation", 0, noise=self.noise)
        if not math.isfinite(self.grad_scale):
            raise UserError(f"optimisation.grad_scale must be a finite number, got {self.grad_scale}")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"optimisation.clip must be above 0, got {self.clip}; set it to null for no limit")
        if not 0 <= self.momentum < 1:
            raise UserError(f"optimisation.momentum must be at least 0 and less than 1, got {self.momentum}")
        if self.renormalise not in ("norm", "bands", None):
            raise UserError(f"optimisation.renormalise must be norm, bands or null, got {self.renormalise!r}")

    def renormalisation(self, first: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The function that updates end with, for first latents (..., C, h, w); None for none."""
        if self.renormalise is None:
            return None
        return keep_norm(first) if self.renormalise == "norm" else keep_band_norms(first)


def clip_elements(gradient: Tensor, limit: float | None) -> Tensor:
    """Each element in [-limit, limit]; with a clipped norm, few large elements would shrink all others."""
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
    """A function that scales latents to the norms of the first latents.

    Normal noise of many elements has nearly the same norm always, so the model has seen no other.

    Args:
        first: (..., C, h, w).
    """
    norms = latent_norms(first)
    return lambda latents: latents * (norms / latent_norms(latents))


def keep_band_norms(first: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that scales latents to the norms of the first latents in each band of each channel.

    Normal noise has the same strength at all frequencies. A gradient is strongest at low frequencies, which are few.
    Under one norm for all frequencies they outweigh the others: flat, glaring colours, far from any latents that the
    model has started from. Bands are the mean, and octaves of the spatial frequency.

    Args:
        first: (..., C, h, w).
    """
    bands = _octaves(*first.shape[-2:]).to(first.device)
    _, norms = _spectrum(first, bands)

    def restore(latents: Tensor) -> Tensor:
        spectrum, current = _spectrum(latents, bands)
        factors = norms / current.clamp(min=torch.finfo(current.dtype).eps)
        scaled = spectrum * factors[..., bands.flatten()].reshape(spectrum.shape)
        restored: Tensor = torch.fft.ifft2(scaled, norm="ortho").real.to(latents)
        return restored

    return restore


def _octaves(height: int, width: int) -> Tensor:
    """Band (height, width) of each frequency: 0 for the mean, 1 up to one wave across an image, 2 up to two."""
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
    *,
    grad_scale: float = 1.0,
    clip: float | None = 1e-3,
    momentum: float = 0.9,
    perturbation: Tensor | None = None,
    renormalise: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One update; see the module for its parts and their order.

    Args:
        latents: (..., C, h, w) ``x``.
        gradient: (..., C, h, w) gradient of the loss.
        buffer: (..., C, h, w) ``b`` of the previous update, zeros at first.
        grad_scale: ``s``, the learning rate.
        clip: ``c``; None for no limit.
        momentum: ``m`` in [0, 1).
        perturbation: (..., C, h, w) ``d n``; None for none.
        renormalise: function that updates end with, such as :func:`keep_norm`; None for none.

    Returns:
        (..., C, h, w) latents, and the buffer for the next update.
    """
    buffer = momentum * buffer + clip_elements(grad_scale * gradient, clip)
    latents = latents - buffer
    if perturbation is not None:
        latents = latents + perturbation
    return latents if renormalise is None else renormalise(latents), buffer
