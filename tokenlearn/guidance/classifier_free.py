"""Classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

C = TypeVar("C")


def classifier_free_guidance(unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
    """Extrapolate from the unconditional prediction past the conditional one.

    ``e = e_uncond + s (e_cond - e_uncond)``, equation 6 of Ho and Salimans, "Classifier-Free Diffusion Guidance"
    (https://arxiv.org/abs/2207.12598), with ``s = 1 + w`` in their notation, which is the scale that diffusers uses:
    0 ignores the prompt, 1 is no guidance. Being affine, it may be applied to noise, velocity or x0 predictions alike.

    Args:
        unconditional: (B, C, h, w) prediction for the empty or negative prompt.
        conditional: (B, C, h, w) prediction for the prompt.
        guidance_scale: ``s``.

    Returns:
        (B, C, h, w) guided prediction.
    """
    return unconditional + guidance_scale * (conditional - unconditional)


class ClassifierFreeGuidance:
    """Classifier-free guidance as the ``combine`` argument of :func:`tokenlearn.diffusion.sample`.

    Args:
        guidance_scale: 1 is no guidance, and then the unconditional prediction is never evaluated.
    """

    def __init__(self, guidance_scale: float) -> None:
        self.guidance_scale = guidance_scale

    def conditionings(self, unconditional: C, conditional: C) -> list[C]:
        """What the network has to be evaluated for, in the order in which ``__call__`` takes the predictions."""
        return [conditional] if self.guidance_scale == 1 else [unconditional, conditional]

    def __call__(self, predictions: Sequence[Tensor], step: int) -> Tensor:
        """Guided prediction.

        Args:
            predictions: (B, C, h, w) for each of :meth:`conditionings`.
            step: index of the sampling step; the rule is the same at every step.

        Returns:
            (B, C, h, w) guided prediction.
        """
        if self.guidance_scale == 1:
            (conditional,) = predictions
            return conditional
        unconditional, conditional = predictions
        return classifier_free_guidance(unconditional, conditional, self.guidance_scale)
