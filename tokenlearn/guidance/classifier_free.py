"""Classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tokenlearn.errors import UserError
from tokenlearn.guidance.base import C, GuidanceRule


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


class ClassifierFreeGuidance(GuidanceRule):
    """Classifier-free guidance.

    Args:
        guidance_scale: 1 is no guidance, and then the unconditional prediction is never evaluated.

    Raises:
        UserError: if the scale is not finite.
    """

    def __init__(self, guidance_scale: float = 7.5) -> None:
        if not math.isfinite(guidance_scale):
            raise UserError(f"guidance_scale must be a finite number, got {guidance_scale}")
        self.guidance_scale = guidance_scale

    def conditionings(self, unconditional: C, prompt: C, *concepts: C) -> list[C]:
        """See :class:`GuidanceRule`; the prompt alone at scale 1."""
        return [prompt] if self.guidance_scale == 1 else [unconditional, prompt]

    def __call__(self, predictions: Sequence[Tensor], step: int) -> Tensor:
        """See :class:`GuidanceRule`; the rule is the same at every step."""
        if self.guidance_scale == 1:
            (conditional,) = predictions
            return conditional
        unconditional, conditional = predictions
        return classifier_free_guidance(unconditional, conditional, self.guidance_scale)
