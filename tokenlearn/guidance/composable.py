"""Composable guidance: several conditions at once, each with a signed scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenlearn.errors import UserError
from tokenlearn.guidance.base import C, GuidanceRule


def composable_guidance(unconditional: Tensor, conditionals: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """Add the direction of every condition, each with its signed scale.

    ``e = e_0 + sum_a s_a (e_a - e_0)``, the conjunction of Composable Diffusion (Liu et al., 2022,
    https://arxiv.org/abs/2206.01714, equation 11) and, for ``s_a < 0``, its negation. One term is classifier-free
    guidance. CASO (https://arxiv.org/abs/2505.14254) edits with ``s_a`` of either sign: one token adds and removes.

    Args:
        unconditional: (B, C, h, w) prediction ``e_0``.
        conditionals: (B, C, h, w) prediction ``e_a`` for each condition.
        scales: () or (B,) scale ``s_a`` for each condition.

    Returns:
        (B, C, h, w) guided prediction.
    """
    guided = unconditional
    for conditional, scale in zip(conditionals, scales, strict=True):
        weight = scale.to(guided).reshape(-1, *[1] * (guided.ndim - 1))
        guided = guided + weight * (conditional - unconditional)
    return guided


class ComposableGuidance(GuidanceRule):
    """Composable guidance by a prompt and any number of concepts.

    The prompt is a condition like the others, with its usual scale. Alternatively the first conditioning stands for
    the image itself, and all conditions are directions away from it.

    Args:
        scales: one per condition: a number, or (B,) one for each sample, as an interpolation strip needs. A condition
            whose scale is 0 for all samples is never evaluated. With ``concepts``, the first scale is the prompt's.
        concepts: prompts of the conditions after the first.

    Raises:
        UserError: if a scale has more than one dimension or is not finite, or the concepts do not match the scales.
    """

    def __init__(self, scales: Sequence[float | Tensor], concepts: Sequence[str] = ()) -> None:
        self.scales = [torch.as_tensor(scale, dtype=torch.float32) for scale in scales]
        for scale in self.scales:
            if scale.ndim > 1 or not scale.isfinite().all():
                raise UserError(f"a guidance scale must be a finite number or one per sample, got {scale.tolist()}")
        if concepts and len(concepts) != len(scales) - 1:
            raise UserError(
                f"ComposableGuidance has {len(scales)} scales for a prompt and {len(concepts)} concepts; give one for "
                "the prompt and one for each concept"
            )
        self.concepts = tuple(concepts)
        self.active = [index for index, scale in enumerate(self.scales) if scale.any()]

    @property
    def concept_prompts(self) -> Sequence[str]:
        """See :class:`GuidanceRule`."""
        return self.concepts

    def conditionings(self, unconditional: C, *conditionals: C) -> list[C]:
        """See :class:`GuidanceRule`; conditions with scale 0 are left out.

        Raises:
            ValueError: if there are not as many conditions as scales.
        """
        if len(conditionals) != len(self.scales):
            raise ValueError(f"{len(conditionals)} conditions for {len(self.scales)} guidance scales")
        return [unconditional, *(conditionals[index] for index in self.active)]

    def __call__(self, predictions: Sequence[Tensor], step: int) -> Tensor:
        """See :class:`GuidanceRule`; the rule is the same at every step."""
        unconditional, *conditionals = predictions
        return composable_guidance(unconditional, conditionals, [self.scales[index] for index in self.active])
