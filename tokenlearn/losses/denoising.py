"""The denoising error that diffusion models are trained by, and its weight by noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenlearn.diffusion.process import Kind
from tokenlearn.errors import UserError


@dataclass(frozen=True)
class MinSNR:
    """Weights by the signal-to-noise ratio, which keep easy timesteps from outweighing the others.

    Hang et al., 2023 (https://arxiv.org/abs/2303.09556): the squared error of the clean latents counts
    ``min(SNR, gamma)`` times, ``SNR = alpha^2 / sigma^2``.

    Attributes:
        gamma: limit; 5 in the paper. Smaller ones give less weight to little noise.

    Raises:
        UserError: if it is not above 0.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.gamma < math.inf:
            raise UserError(f"gamma of MinSNR must be a number above 0, got {self.gamma}; the paper's is 5")

    def weights(self, alpha: Tensor, sigma: Tensor, kind: Kind) -> Tensor:
        """Weights of squared errors of a network's own predictions.

        An error ``d`` of the noise is ``sigma / alpha d`` of x0, one of a velocity or a flow ``sigma d``. So noise has
        ``min(SNR, gamma) / SNR``, and velocity ``min(SNR, gamma) / (SNR + 1)``.

        Args:
            alpha: (B,) factor of the image at each timestep.
            sigma: (B,) factor of the noise.
            kind: kind of prediction.

        Returns:
            (B,), finite at any noise level above 0.
        """
        if kind == "noise":
            return (self.gamma * sigma.square() / alpha.square()).clamp(max=1)
        weights = (alpha.square() / sigma.square()).clamp(max=self.gamma)
        return weights if kind == "x0" else weights * sigma.square()


def denoising_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error (B,) of predictions (B, C, h, w) of targets (B, C, h, w)."""
    error: Tensor = torch.square(prediction - target).mean(dim=(1, 2, 3))
    return error
