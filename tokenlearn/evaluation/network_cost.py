"""Counts of a diffusion network's evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenlearn.models import Conditioning, DiffusionBackbone


class NetworkCost:
    """Evaluations of a network for one image each, between entering and leaving, or starting and stopping.

    Args:
        backbone: the model.
        on_evaluation: called before each evaluation, of however many images; None for nothing.

    Attributes:
        evaluations: evaluations so far.
        differentiated: how many of them had a gradient.
    """

    def __init__(self, backbone: DiffusionBackbone, on_evaluation: Callable[[], None] | None = None) -> None:
        self.backbone, self.on_evaluation = backbone, on_evaluation
        self.evaluations = self.differentiated = 0
        self._hook: RemovableHandle | None = None

    @property
    def total(self) -> int:
        """Cost in evaluations: a backward pass costs as much as two."""
        return self.evaluations + 2 * self.differentiated

    def reset(self) -> None:
        """Count from zero."""
        self.evaluations = self.differentiated = 0

    def start(self) -> None:
        """Begin to count."""
        # Before an evaluation, since recomputation for a gradient leaves the network before its end.
        self._hook = self.backbone.register_forward_pre_hook(self._count)

    def stop(self) -> None:
        """Count no more."""
        if self._hook is not None:
            self._hook.remove()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _count(self, module: nn.Module, inputs: tuple[Tensor, Tensor, Conditioning]) -> None:
        latents, _, conditioning = inputs
        self.evaluations += len(conditioning)
        if torch.is_grad_enabled() and (latents.requires_grad or conditioning.requires_grad):
            self.differentiated += len(conditioning)
        if self.on_evaluation is not None:
            self.on_evaluation()
