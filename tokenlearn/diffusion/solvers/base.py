"""What a sampler needs: a model in which guidance has already happened, and a solver that follows it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from tokenlearn.diffusion.gradients import Gradient
from tokenlearn.diffusion.process import Process
from tokenlearn.errors import UserError


class Model(Protocol):
    """A guided model: one prediction for latents at a timestep, see :class:`tokenlearn.guidance.GuidedModel`.

    Attributes:
        process: noise process, which says the kind of prediction.
        conditionings: what the predictions depend on besides the latents: dataclasses of tensors.
    """

    process: Process
    conditionings: Sequence[Any]

    @property
    def has_memory(self) -> bool:
        """Whether a step depends on the steps before it."""

    def begin(
        self, timesteps: Tensor, end: Tensor | None = None, generators: Sequence[torch.Generator] | None = None
    ) -> None:
        """Take note of the steps (N,) that follow, and of where they end; None for clean latents."""

    def __call__(self, latents: Tensor, timestep: Tensor, step: int, recompute: bool = False) -> Tensor:
        """Prediction (B, C, h, w) of the process's kind at the step with an index.

        ``recompute`` asks for activations to be computed again in the backward pass.
        """

    def noise(self, latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        """The same as a noise prediction."""

    def with_conditionings(self, conditionings: Sequence[Any]) -> Self:
        """The same model with other conditionings."""


StepOptions = Callable[[int], Mapping[str, Any]]
Callback = Callable[[int, Tensor], None]


class Solver(ABC):
    """A solver that is bound to a number of steps and to a model's noise levels.

    Attributes:
        steps: number of steps from pure noise to the image.
    """

    steps: int

    @property
    @abstractmethod
    def timesteps(self) -> list[int]:
        """Noise levels at which the solver can start, from the noisiest on."""

    @abstractmethod
    def sample(
        self,
        model: Model,
        latents: Tensor,
        *,
        gradient: Gradient | None,
        generators: list[torch.Generator] | None,
        step_options: StepOptions | None,
        callback: Callback | None,
        from_timestep: int | None,
        to_timestep: int | None,
    ) -> Tensor:
        """See :func:`tokenlearn.diffusion.sample`."""

    def check_timestep(self, timestep: int, setting: str) -> None:
        """Refuse a noise level at which the solver cannot start.

        Args:
            timestep: noise level.
            setting: its name in messages, such as ``model.editing.timestep``.

        Raises:
            UserError: naming the nearest noise levels.
        """
        timesteps = self.timesteps
        if timestep not in timesteps:
            raise UserError(
                f"{setting} {timestep} is not a timestep of {len(timesteps)} steps; take "
                f"{nearest(timestep, timesteps)}, or another number of steps"
            )


def nearest(timestep: int, timesteps: Sequence[int]) -> str:
    """The two timesteps nearest to another, as a message names them."""
    found = sorted(sorted(set(timesteps), key=lambda other: abs(other - timestep))[:2])
    return " or ".join(map(str, found))
