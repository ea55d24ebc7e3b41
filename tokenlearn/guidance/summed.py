"""Several guidance terms at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

C = TypeVar("C")


def summed_guidance(unconditional: Tensor, conditionals: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """Add the direction of every condition, each with its own signed scale.

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


class SummedGuidance:
    """Summed guidance as the ``combine`` argument of :func:`tokenlearn.diffusion.sample`.

    A prompt that the picture is drawn from is a condition like the others, with its usual scale; or it takes the place
    of the empty prompt, and the conditions are then directions away from it.

    Args:
        scales: one per condition: a number, or (B,) one for each sample, as an interpolation strip needs. A condition
            whose scale is 0 for all samples is never evaluated.

    Raises:
        ValueError: if a scale has more than one dimension or is not finite.
    """

    def __init__(self, scales: Sequence[float | Tensor]) -> None:
        self.scales = [torch.as_tensor(scale, dtype=torch.float32) for scale in scales]
        for scale in self.scales:
            if scale.ndim > 1 or not scale.isfinite().all():
                raise ValueError(f"a guidance scale must be a finite number or one per sample, got {scale.tolist()}")
        self.active = [index for index, scale in enumerate(self.scales) if scale.any()]

    def conditionings(self, unconditional: C, *conditionals: C) -> list[C]:
        """What the network has to be evaluated for, in the order in which ``__call__`` takes the predictions.

        Raises:
            ValueError: if there are not as many conditions as scales.
        """
        if len(conditionals) != len(self.scales):
            raise ValueError(f"{len(conditionals)} conditions for {len(self.scales)} guidance scales")
        return [unconditional, *(conditionals[index] for index in self.active)]

    def __call__(self, predictions: Sequence[Tensor], step: int) -> Tensor:
        """Guided prediction.

        Args:
            predictions: (B, C, h, w) for each of :meth:`conditionings`.
            step: index of the sampling step; the rule is the same at every step.

        Returns:
            (B, C, h, w) guided prediction.
        """
        unconditional, *conditionals = predictions
        return summed_guidance(unconditional, conditionals, [self.scales[index] for index in self.active])
