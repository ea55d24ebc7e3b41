"""What a network saw on the way from noise to images, and the images it predicts from there in one step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from tokenlearn.diffusion.process import Process
from tokenlearn.diffusion.sampling import sample
from tokenlearn.diffusion.solvers.base import Model, Solver


@dataclass(frozen=True)
class Trajectory:
    """Inputs of the network along a sampled trajectory, constants.

    Attributes:
        latents: (S, B, C, h, w) latents at S noise levels, as the network takes them.
        timesteps: (S,) noise levels, from the noisiest on.
        total: number of noise levels of the whole way, of which these are the first.
    """

    latents: Tensor
    timesteps: Tensor
    total: int

    def predict_clean(self, model: Model, indices: Tensor) -> Tensor:
        """Clean latents (B, C, h, w) that the model predicts from a noise level of each sample.

        Differentiable by the model's conditionings. It is the editing step of CASO (one-step editing of
        https://www.ijcai.org/proceedings/2025/0082.pdf) from latents that sampling has reached.

        Args:
            model: guided model, whose rule does not depend on the step.
            indices: (B,) positions in ``timesteps``.
        """
        latents = self.latents[indices, torch.arange(len(indices), device=indices.device)]
        timesteps = self.timesteps[indices]
        return model.process.x0(latents, model(latents, timesteps, 0), timesteps)


@torch.no_grad()
def sample_trajectory(
    model: Model,
    latents: Tensor,
    *,
    solver: Solver,
    generators: list[torch.Generator] | None = None,
    share: float = 1.0,
) -> Trajectory:
    """Sample a share of the way, and keep what the network saw.

    Args:
        model: as of :func:`tokenlearn.diffusion.sample`.
        latents: noise, as there.
        solver: as there.
        generators: as there.
        share: of the noise levels, from the noisiest on; at least one is sampled.
    """
    recorder = _Recorder(model)
    total = len(solver.timesteps)
    number = max(1, round(share * total))
    # A timestep that comes twice, as with second-order schedulers, does not say where to stop.
    stops = number < total and len(set(solver.timesteps)) == total
    end = solver.timesteps[number] if stops else None
    sample(recorder, latents, solver=solver, generators=generators, to_timestep=end)
    return Trajectory(torch.stack(recorder.latents)[:number], torch.stack(recorder.timesteps)[:number], total)


class _Recorder:
    """A model that keeps its inputs."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.process: Process = model.process
        self.conditionings = model.conditionings
        self.latents: list[Tensor] = []
        self.timesteps: list[Tensor] = []

    @property
    def has_memory(self) -> bool:
        return self._model.has_memory

    def begin(
        self, timesteps: Tensor, end: Tensor | None = None, generators: Sequence[torch.Generator] | None = None
    ) -> None:
        self._model.begin(timesteps, end, generators)

    def __call__(self, latents: Tensor, timestep: Tensor, step: int, recompute: bool = False) -> Tensor:
        self.latents.append(latents)
        self.timesteps.append(timestep)
        return self._model(latents, timestep, step, recompute)

    def noise(self, latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        self.latents.append(latents)
        self.timesteps.append(timestep)
        return self._model.noise(latents, timestep, step)

    def with_conditionings(self, conditionings: Sequence[Any]) -> Self:
        other = copy.copy(self)  # with the same lists
        other._model, other.conditionings = self._model.with_conditionings(conditionings), conditionings
        return other
