"""Noise processes: how latents are made of an image and noise, and what a network predicts about them.

At every timestep a process mixes clean latents and noise,

    z = alpha x0 + sigma e          latents, Ho et al., 2020, https://arxiv.org/abs/2006.11239, equation 4

and a network predicts one of four quantities, each of which determines the others together with z:

    e                               noise
    v = alpha e - sigma x0          velocity, where alpha^2 + sigma^2 = 1 (Salimans and Ho, 2022,
                                    https://arxiv.org/abs/2202.00512, appendix D)
    x0                              clean latents
    u = e - x0                      flow, where alpha + sigma = 1 (Lipman et al., 2023,
                                    https://arxiv.org/abs/2210.02747; Liu et al., 2023,
                                    https://arxiv.org/abs/2209.03003)

In all functions ``alpha`` and ``sigma`` are (), or (B,) with one value per sample; everything else is (B, ...) of one
shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from tokenlearn.errors import UserError

Kind = Literal["noise", "velocity", "x0", "flow"]
"""Kinds of prediction."""


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Values () or (B,) in a shape that broadcasts over the samples of ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(like)


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Latents ``z = alpha x0 + sigma e``."""
    return _per_sample(alpha, x0) * x0 + _per_sample(sigma, x0) * noise


def velocity(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Velocity ``v = alpha e - sigma x0``."""
    return _per_sample(alpha, x0) * noise - _per_sample(sigma, x0) * x0


def x0_from_noise(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """``x0 = (z - sigma e) / alpha``; not finite at alpha 0, the last timestep of a zero-terminal schedule."""
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


def x0_from_flow(latents: Tensor, u: Tensor, sigma: Tensor) -> Tensor:
    """``x0 = z - sigma u``."""
    return latents - _per_sample(sigma, latents) * u


def noise_from_flow(latents: Tensor, u: Tensor, alpha: Tensor) -> Tensor:
    """``e = z + alpha u``."""
    return latents + _per_sample(alpha, latents) * u


def convert(
    prediction: Tensor, latents: Tensor, alpha: Tensor, sigma: Tensor, *, source: Kind, target: Kind
) -> Tensor:
    """Turn one kind of prediction into another at the same latents.

    Args:
        prediction: (B, C, h, w) of the kind ``source``.
        latents: (B, C, h, w) at which it was predicted.
        alpha: () or (B,) factor of x0 at the timestep.
        sigma: () or (B,) factor of the noise at the timestep.
        source: kind of ``prediction``.
        target: kind of the result.

    Returns:
        (B, C, h, w) of the kind ``target``; ``prediction`` itself if the kinds are the same.
    """
    if source == target:
        return prediction
    if source == "noise":
        noise, x0 = prediction, x0_from_noise(latents, prediction, alpha, sigma)
    elif source == "x0":
        noise, x0 = noise_from_x0(latents, prediction, alpha, sigma), prediction
    elif source == "velocity":
        noise = noise_from_velocity(latents, prediction, alpha, sigma)
        x0 = x0_from_velocity(latents, prediction, alpha, sigma)
    else:
        noise, x0 = noise_from_flow(latents, prediction, alpha), x0_from_flow(latents, prediction, sigma)
    if target == "noise":
        return noise
    if target == "x0":
        return x0
    return velocity(x0, noise, alpha, sigma) if target == "velocity" else noise - x0


def target(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, kind: Kind) -> Tensor:
    """What a network of a kind predicts at ``z = alpha x0 + sigma e``, from clean latents and noise (B, C, h, w).

    Finite at any noise level, unlike a conversion from one of the two.
    """
    if kind == "noise":
        return noise
    if kind == "x0":
        return x0
    return velocity(x0, noise, alpha, sigma) if kind == "velocity" else noise - x0


def change_of_prediction(noise_change: Tensor, alpha: Tensor, sigma: Tensor, kind: Kind) -> Tensor:
    """Change of a prediction by a change of the noise in it, at fixed latents.

    With ``x0 = (z - sigma e) / alpha``, a change ``d`` of ``e`` is ``-(sigma / alpha) d`` of x0, and ``d / alpha`` of
    a velocity or a flow. Where alpha is 0 the latents are the noise, whatever the prediction, so nothing changes.

    Args:
        noise_change: (B, C, h, w) ``d``.
        alpha: () or (B,) factor of x0 at the timestep.
        sigma: () or (B,) factor of the noise at the timestep.
        kind: kind of the prediction.

    Returns:
        (B, C, h, w), finite at any noise level.
    """
    if kind == "noise":
        return noise_change
    factor = -sigma / alpha if kind == "x0" else 1 / alpha
    return _per_sample(torch.where(alpha == 0, 0, factor), noise_change) * noise_change


class Process(nn.Module, ABC):
    """A noise process and the kind of prediction of the network that was trained on it.

    Each backbone adapter states its process. Timesteps are values as schedulers give them, () or (B,), never places in
    a table.

    Args:
        kind: kind of prediction.
        num_timesteps: number of timesteps of the training; the noisiest is ``num_timesteps - 1`` of a discrete process
            and ``num_timesteps`` of a flow.

    Attributes:
        kind, num_timesteps: as given.
    """

    def __init__(self, kind: Kind, num_timesteps: int) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.num_timesteps = num_timesteps

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the process."""

    @abstractmethod
    def alpha(self, timestep: Tensor) -> Tensor:
        """Factor of the image in the latents at timesteps () or (B,), of the same shape."""

    @abstractmethod
    def sigma(self, timestep: Tensor) -> Tensor:
        """Factor of the noise in the latents at timesteps () or (B,), of the same shape."""

    @abstractmethod
    def timestep_of_ratio(self, ratio: float) -> int:
        """The timestep of the training whose noise ratio ``sigma / alpha`` is nearest to ``ratio``."""

    def add_noise(self, x0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Latents (B, C, h, w) of clean latents and noise (B, C, h, w) at timesteps () or (B,)."""
        return add_noise(x0, noise, self.alpha(timestep), self.sigma(timestep))

    def x0(self, latents: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """Clean latents (B, C, h, w) from a prediction (B, C, h, w) of this process's kind."""
        return self._converted(prediction, latents, timestep, self.kind, "x0")

    def noise(self, latents: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """Noise (B, C, h, w) from a prediction (B, C, h, w) of this process's kind."""
        return self._converted(prediction, latents, timestep, self.kind, "noise")

    def prediction(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Prediction (B, C, h, w) of this process's kind from noise (B, C, h, w)."""
        return self._converted(noise, latents, timestep, "noise", self.kind)

    def target(self, x0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the network should predict for clean latents and noise (B, C, h, w), of their shape."""
        return target(x0, noise, self.alpha(timestep), self.sigma(timestep), self.kind)

    def change_of_prediction(self, noise_change: Tensor, timestep: Tensor) -> Tensor:
        """Change of a prediction (B, C, h, w) by a change of the noise in it, see :func:`change_of_prediction`."""
        return change_of_prediction(noise_change, self.alpha(timestep), self.sigma(timestep), self.kind)

    def _converted(self, prediction: Tensor, latents: Tensor, timestep: Tensor, source: Kind, target: Kind) -> Tensor:
        alpha, sigma = self.alpha(timestep), self.sigma(timestep)
        return convert(prediction, latents, alpha, sigma, source=source, target=target)


class DiscreteProcess(Process):
    """A variance-preserving process of N integer timesteps, ``alpha^2 + sigma^2 = 1``.

    Args:
        alphas_cumprod: (N,) squared factor of the image at each timestep of the training, ``alpha_bar``.
        kind: ``noise``, ``velocity`` or ``x0``.

    Raises:
        UserError: if the kind is flow, which belongs to another process.
    """

    alphas: Tensor
    sigmas: Tensor

    def __init__(self, alphas_cumprod: Tensor, kind: Kind) -> None:
        if kind == "flow":
            raise UserError("a process with alpha^2 + sigma^2 = 1 cannot predict flow; use FlowProcess")
        super().__init__(kind, len(alphas_cumprod))
        self.register_buffer("alphas", alphas_cumprod.sqrt().float(), persistent=False)
        self.register_buffer("sigmas", (1 - alphas_cumprod).sqrt().float(), persistent=False)

    @property
    def device(self) -> torch.device:
        """See :class:`Process`."""
        return self.alphas.device

    def alpha(self, timestep: Tensor) -> Tensor:
        """See :class:`Process`."""
        return self.alphas[timestep.long()]

    def sigma(self, timestep: Tensor) -> Tensor:
        """See :class:`Process`."""
        return self.sigmas[timestep.long()]

    def timestep_of_ratio(self, ratio: float) -> int:
        """See :class:`Process`."""
        # In Python's doubles, and the first of equals: a noise level must not depend on the device.
        ratios = [
            sigma / alpha if alpha else float("inf")
            for alpha, sigma in zip(self.alphas.tolist(), self.sigmas.tolist(), strict=True)
        ]
        return min(range(len(ratios)), key=lambda timestep: abs(ratios[timestep] - ratio))


class FlowProcess(Process):
    """A rectified flow, ``z = (1 - s) x0 + s e`` with ``s`` the timestep over ``num_timesteps``.

    Args:
        num_timesteps: timestep of pure noise.
    """

    _anchor: Tensor

    def __init__(self, num_timesteps: int = 1000) -> None:
        super().__init__("flow", num_timesteps)
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)

    @property
    def device(self) -> torch.device:
        """See :class:`Process`."""
        return self._anchor.device

    def alpha(self, timestep: Tensor) -> Tensor:
        """See :class:`Process`."""
        return 1 - self.sigma(timestep)

    def sigma(self, timestep: Tensor) -> Tensor:
        """See :class:`Process`."""
        return timestep.to(torch.float32) / self.num_timesteps

    def timestep_of_ratio(self, ratio: float) -> int:
        """See :class:`Process`; ``s = r / (1 + r)``."""
        return round(self.num_timesteps * ratio / (1 + ratio))
