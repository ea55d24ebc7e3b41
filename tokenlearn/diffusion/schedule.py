"""Noise-schedule conversions.

A variance-preserving process with ``alpha^2 + sigma^2 = 1`` gives three quantities at each timestep

    z = alpha x0 + sigma e          latents, Ho et al., 2020, https://arxiv.org/abs/2006.11239, equation 4
    v = alpha e - sigma x0          velocity, Salimans and Ho, 2022, https://arxiv.org/abs/2202.00512, appendix D

of which z and any one of x0 (sample), e (noise) and v determine the others. In all functions ``alpha`` and ``sigma``
are (), or (B,) with one value per sample; everything else is (B, ...) of one shape.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]
"""Kinds of network output, by the names of diffusers: noise, velocity, and x0."""


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Shape (B,) or () values so that they broadcast over the samples of ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(like)


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Latents ``z = alpha x0 + sigma e``."""
    return _per_sample(alpha, x0) * x0 + _per_sample(sigma, x0) * noise


def velocity(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Velocity ``v = alpha e - sigma x0``."""
    return _per_sample(alpha, x0) * noise - _per_sample(sigma, x0) * x0


def x0_from_noise(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """``x0 = (z - sigma e) / alpha``; not finite where alpha is 0, the last timestep of a zero-terminal schedule."""
    return (latents - _per_sample(sigma, latents) * noise) / _per_sample(alpha, latents)


def noise_from_x0(latents: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """``e = (z - alpha x0) / sigma``."""
    return (latents - _per_sample(alpha, latents) * x0) / _per_sample(sigma, latents)


def x0_from_velocity(latents: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """``x0 = alpha z - sigma v``."""
    return _per_sample(alpha, latents) * latents - _per_sample(sigma, latents) * v


def noise_from_velocity(latents: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """``e = sigma z + alpha v``."""
    return _per_sample(sigma, latents) * latents + _per_sample(alpha, latents) * v


def convert(
    prediction: Tensor, latents: Tensor, alpha: Tensor, sigma: Tensor, from_: PredictionType, to: PredictionType
) -> Tensor:
    """Turn one kind of prediction into another at the same latents.

    Args:
        prediction: (B, C, h, w) of the kind ``from_``.
        latents: (B, C, h, w) at which it was predicted.
        alpha: () or (B,) factor of x0 at the timestep.
        sigma: () or (B,) factor of the noise at the timestep.
        from_: kind of ``prediction``.
        to: wanted kind.

    Returns:
        (B, C, h, w) of the kind ``to``; ``prediction`` itself if the kinds are the same.
    """
    if from_ == to:
        return prediction
    if from_ == "epsilon":
        noise, x0 = prediction, x0_from_noise(latents, prediction, alpha, sigma)
    elif from_ == "sample":
        noise, x0 = noise_from_x0(latents, prediction, alpha, sigma), prediction
    else:
        noise = noise_from_velocity(latents, prediction, alpha, sigma)
        x0 = x0_from_velocity(latents, prediction, alpha, sigma)
    if to == "epsilon":
        return noise
    return x0 if to == "sample" else velocity(x0, noise, alpha, sigma)
