"""Safe latent diffusion: steer away from an unwanted concept, only where an image comes close to it.

Equation numbers are those of Schramowski et al., "Safe Latent Diffusion" (https://arxiv.org/abs/2211.05105).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor

from tokenlearn.errors import UserError
from tokenlearn.guidance.base import C, GuidanceRule
from tokenlearn.guidance.classifier_free import classifier_free_guidance
from tokenlearn.guidance.semantic import check_momentum, check_warmup, update_momentum, with_momentum


def safety_scale(conditional: Tensor, unwanted: Tensor, scale: float, threshold: float) -> Tensor:
    """Element-wise scale ``mu`` of the safety guidance: equations 5 and 6.

    ``mu = min(1, |s_S (e_p - e_S)|)`` where ``e_p - e_S < lambda``, and 0 elsewhere. The comparison is signed, and the
    scale never exceeds 1, as in the authors' code.

    Args:
        conditional: (B, C, h, w) prediction ``e_p`` for the prompt.
        unwanted: (B, C, h, w) prediction ``e_S`` for the unwanted concept.
        scale: ``s_S``, at least 0.
        threshold: ``lambda``.

    Returns:
        (B, C, h, w) scale in [0, 1].
    """
    difference = conditional - unwanted
    return torch.where(difference < threshold, (scale * difference.abs()).clamp(max=1), 0)


def safety_guidance(unconditional: Tensor, unwanted: Tensor, element_scale: Tensor) -> Tensor:
    """``gamma = mu (e_S - e_0)``: equation 4.

    Args:
        unconditional: (B, C, h, w) prediction ``e_0``.
        unwanted: (B, C, h, w) prediction ``e_S``.
        element_scale: (B, C, h, w) ``mu`` of :func:`safety_scale`.

    Returns:
        (B, C, h, w) guidance, to be subtracted.
    """
    return element_scale * (unwanted - unconditional)


def safely_guided(unconditional: Tensor, conditional: Tensor, guidance_scale: float, guidance: Tensor) -> Tensor:
    """``e = e_0 + s_g (e_p - e_0 - gamma)``: equation 3.

    Args:
        unconditional: (B, C, h, w) prediction ``e_0``.
        conditional: (B, C, h, w) prediction ``e_p``.
        guidance_scale: ``s_g``.
        guidance: (B, C, h, w) ``gamma``.

    Returns:
        (B, C, h, w) guided prediction.
    """
    return classifier_free_guidance(unconditional, conditional - guidance, guidance_scale)


@dataclass(frozen=True)
class SafetySettings:
    """How strongly an unwanted concept is avoided; the defaults are the paper's "medium".

    Attributes:
        scale: ``s_S``, at least 0; 0 is off.
        threshold: ``lambda``; larger values act on more elements.
        warmup_steps: ``delta``, steps before the guidance is applied.
        momentum_scale: ``s_m`` in [0, 1]; 0 is no momentum, and warm-up steps then cost no evaluation.
        momentum_beta: ``beta_m`` in [0, 1), the share of the momentum that a step keeps.

    Raises:
        UserError: if one is out of range.
    """

    scale: float = 1000.0
    threshold: float = 0.01
    warmup_steps: int = 10
    momentum_scale: float = 0.3
    momentum_beta: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise UserError(f"the scale of safety guidance must be a number of at least 0, got {self.scale}")
        if not math.isfinite(self.threshold):
            raise UserError(f"the threshold of safety guidance must be a finite number, got {self.threshold}")
        check_momentum(self.warmup_steps, self.momentum_scale, self.momentum_beta)

    def is_needed(self, step: int) -> bool:
        """Whether the guidance acts at a step or gathers momentum for later ones."""
        return self.scale > 0 and (step >= self.warmup_steps or self.momentum_scale > 0)


SAFETY_PRESETS: Mapping[str, SafetySettings] = MappingProxyType(
    {
        "weak": SafetySettings(200, 0.0, 15, 0.0, 0.0),  # diffusers' "WEAK" says 20, the authors' code 200
        "medium": SafetySettings(1000, 0.01, 10, 0.3, 0.4),
        "strong": SafetySettings(2000, 0.025, 7, 0.5, 0.7),
        "max": SafetySettings(5000, 1.0, 0, 0.5, 0.7),
    }
)
"""The paper's four strengths, for 50 steps."""


class SafeGuidance(GuidanceRule):
    """Safe latent diffusion.

    Momentum (equations 7 and 8) is built up from the first step on and applied after the warm-up. Each run of the
    sampler has a momentum, on the device and with its graph.

    Args:
        guidance_scale: ``s_g`` of the prompt, which multiplies the safety guidance too; at 1 the unconditional
            prediction is evaluated only for the safety guidance.
        settings: how strongly the concept is avoided.
        concept: the unwanted concept.

    Raises:
        UserError: if the guidance scale is not finite.
    """

    def __init__(
        self, guidance_scale: float = 7.5, settings: SafetySettings = SAFETY_PRESETS["medium"], concept: str = ""
    ) -> None:
        if not math.isfinite(guidance_scale):
            raise UserError(f"guidance_scale must be a finite number, got {guidance_scale}")
        self.guidance_scale, self.settings, self.concept = guidance_scale, settings, concept
        self._momentum: Tensor | None = None

    @property
    def concept_prompts(self) -> Sequence[str]:
        """See :class:`GuidanceRule`."""
        return (self.concept,)

    @property
    def has_memory(self) -> bool:
        """See :class:`GuidanceRule`."""
        return self.settings.scale > 0 and self.settings.momentum_scale > 0

    def conditionings(self, unconditional: C, prompt: C, *concepts: C) -> list[C]:
        """See :class:`GuidanceRule`."""
        (unwanted,) = concepts
        return [unconditional, prompt, unwanted]

    def fresh(self) -> Self:
        """See :class:`GuidanceRule`."""
        fresh = super().fresh()
        fresh._momentum = None
        return fresh

    def needed(self, step: int) -> list[int]:
        """Indices of :meth:`conditionings` that matter at a step or, through momentum, at a later one."""
        if self.settings.is_needed(step):
            return [0, 1, 2]
        return [1] if self.guidance_scale == 1 else [0, 1]

    def check_steps(self, steps: int) -> None:
        """Refuse a number of steps that the warm-up takes entirely, unless the scale is 0, which is off.

        Raises:
            UserError: naming the warm-up.
        """
        if self.settings.scale > 0:
            check_warmup(self.settings.warmup_steps, steps, "SafeGuidance")

    def __call__(self, predictions: Sequence[Tensor], step: int) -> Tensor:
        """See :class:`GuidanceRule`; step 0 forgets everything before it."""
        if len(predictions) == 1:
            return predictions[0]
        unconditional, conditional, *rest = predictions
        if rest:
            guidance = self._guidance(unconditional, conditional, rest[0], step)
            if step >= self.settings.warmup_steps:
                return safely_guided(unconditional, conditional, self.guidance_scale, guidance)
        return classifier_free_guidance(unconditional, conditional, self.guidance_scale)

    def _guidance(self, unconditional: Tensor, conditional: Tensor, unwanted: Tensor, step: int) -> Tensor:
        """``gamma`` of a step; without momentum, earlier steps may have been left out."""
        settings = self.settings
        element_scale = safety_scale(conditional, unwanted, settings.scale, settings.threshold)
        guidance = safety_guidance(unconditional, unwanted, element_scale)
        if settings.momentum_scale == 0:
            return guidance
        momentum = torch.zeros_like(guidance) if step == 0 or self._momentum is None else self._momentum
        guidance = with_momentum(guidance, momentum, settings.momentum_scale)
        self._momentum = update_momentum(momentum, guidance, settings.momentum_beta)
        return guidance
