"""What a network saw on the way from noise to images, and the images it predicts from there in one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenlearn.diffusion.sampling import sample
from tokenlearn.diffusion.solvers.base import Solver
from tokenlearn.guidance.base import GuidanceRule
from tokenlearn.guidance.guided_model import GuidedModel, Network


@dataclass(frozen=True)
class Trajectory:
    """Inputs and outputs of the network along a sampled trajectory, constants.

    Attributes:
        latents: (S, B, C, h, w) latents at S noise levels, as the network takes them.
        timesteps: (S,) noise levels, from the noisiest on.
        total: number of noise levels of the whole way, of which these are the first.
        conditionings: of the sampling.
        predictions: (S, B, C, h, w) unguided predictions at these levels, by the index of their conditioning.
    """

    latents: Tensor
    timesteps: Tensor
    total: int
    conditionings: Sequence[Any]
    predictions: Mapping[int, Tensor]

    def predict_clean(self, model: GuidedModel[Any], indices: Tensor) -> Tensor:
        """Clean latents (B, C, h, w) that the model predicts from a noise level of each sample.

        Differentiable by the model's conditionings. It is the editing step of CASO (one-step editing of
        https://www.ijcai.org/proceedings/2025/0082.pdf) from latents that sampling has reached. Conditionings that
        have not changed since and require no gradient, such as the empty prompt's, are not evaluated again.

        Args:
            model: guided model, whose rule does not depend on the step.
            indices: (B,) positions in ``timesteps``.
        """
        at = indices, torch.arange(len(indices), device=indices.device)
        latents, timesteps = self.latents[at], self.timesteps[indices]
        known = {
            index: predictions[at]
            for index, predictions in self.predictions.items()
            if not (now := model.conditionings[index]).requires_grad and now.equals(self.conditionings[index])
        }
        predictions = model.predictions(latents, timesteps, 0, known=known)
        return model.process.x0(latents, model.rule(predictions, 0), timesteps)


@torch.no_grad()
def sample_trajectory(
    model: GuidedModel[Any],
    latents: Tensor,
    *,
    solver: Solver,
    generators: list[torch.Generator] | None = None,
    share: float = 1.0,
) -> Trajectory:
    """Sample a share of the way, and keep what the network saw and said.

    Args:
        model: guided model, whose rule evaluates the network once a step.
        latents: noise, as of :func:`tokenlearn.diffusion.sample`.
        solver: as there.
        generators: as there.
        share: of the noise levels, from the noisiest on; at least one is sampled.
    """
    recorder = _Recorder(model.backbone, model.rule, model.conditionings)
    total = len(solver.timesteps)
    number = max(1, round(share * total))
    # A timestep that comes twice, as with second-order schedulers, does not say where to stop.
    stops = number < total and len(set(solver.timesteps)) == total
    end = solver.timesteps[number] if stops else None
    sample(recorder, latents, solver=solver, generators=generators, to_timestep=end)
    recorded = recorder.recorded[:number]
    predictions = {index: torch.stack([level[index] for level in recorded]) for index in recorded[0]}
    return Trajectory(
        torch.stack(recorder.latents)[:number],
        torch.stack(recorder.timesteps)[:number],
        total,
        recorder.conditionings,
        predictions,
    )


class _Recorder(GuidedModel[Any]):
    """A guided model that keeps its inputs and the unguided predictions."""

    def __init__(self, backbone: Network[Any], rule: GuidanceRule, conditionings: Sequence[Any]) -> None:
        super().__init__(backbone, rule, conditionings)
        self.latents: list[Tensor] = []
        self.timesteps: list[Tensor] = []
        self.recorded: list[dict[int, Tensor]] = []

    def predictions(
        self,
        latents: Tensor,
        timestep: Tensor,
        step: int,
        recompute: bool = False,
        known: Mapping[int, Tensor] | None = None,
    ) -> list[Tensor]:
        predictions = super().predictions(latents, timestep, step, recompute, known)
        self.latents.append(latents)
        self.timesteps.append(timestep)
        self.recorded.append(dict(zip(self.needed(step), predictions, strict=True)))
        return predictions
