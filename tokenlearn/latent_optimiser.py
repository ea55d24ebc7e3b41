"""Direct optimisation of diffusion latents (DOODL): descend an objective of the finished image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tokenlearn.diffusion import (
    EDICT,
    Checkpointed,
    Gradient,
    GridSolver,
    Reversible,
    ReversibleSolver,
    invert,
    sample,
)
from tokenlearn.diffusion.latent_optimisation import LatentOptimisation, optimisation_step
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance, GuidedModel, require_differentiable
from tokenlearn.losses.objective import Objective
from tokenlearn.models import Conditioning
from tokenlearn.objectives import require_judge_differs
from tokenlearn.pipeline import Pipeline, Sampling, finished
from tokenlearn.progress import Meter

History = list[dict[str, float]]
"""A row for each step of an optimisation: ``step``, ``loss``, and with a judge ``judge``."""


class Start(NamedTuple):
    """Latents to optimise, and the model that makes images of them.

    Attributes:
        latents: (B, C, h, w), or pairs (B, 2, C, h, w) of inverted images.
        model: guided model.
        generators: one per image, for perturbations and for schedulers that add noise.
    """

    latents: Tensor
    model: GuidedModel[Conditioning]
    generators: Sequence[torch.Generator]


@dataclass(frozen=True)
class OptimisedLatents:
    """Optimised latents of B images.

    Attributes:
        before: (B, 3, H, W) in [0, 1], images of the first latents, on the CPU as all images here.
        after: (B, 3, H, W) in [0, 1], images of the optimised latents.
        latents: (B, C, h, w), or pairs (B, 2, C, h, w) of inverted images.
        history: the losses of each image.
        snapshots: number of updates to images (B, 3, H, W) in [0, 1] after them.
    """

    before: Tensor
    after: Tensor
    latents: Tensor
    history: list[History]
    snapshots: dict[int, Tensor] = field(default_factory=dict)


class LatentOptimiser:
    """Optimises the latents that sampling starts from, so that the finished images meet an objective.

    Every update samples whole images and descends the gradient of their losses through the sampler
    (https://arxiv.org/abs/2303.13703); neither a prompt nor a weight changes. Guidance rule, solver and gradient are
    whatever the pipeline and the caller say. See :mod:`tokenlearn.diffusion.latent_optimisation` for an update.

    Args:
        pipeline: generates the images. Without a solver in its settings, DDIM is used.
        objective: loss of finished images.
        settings: settings of the optimisation.
        gradient: how the gradient goes through the sampler; None for :class:`Reversible` with a reversible solver,
            else :class:`Checkpointed`.
        judge: reports, and guides nothing; its :meth:`Objective.confidence` is in the history.

    Attributes:
        pipeline, objective, settings, judge: as given.
        solver: the bound solver.
        gradient: the gradient that is used.
        from_timestep: noise level of the optimised latents, None for the first.

    Raises:
        UserError: if the objective or the judge needs targets, the judge shares a model with the objective, the
            gradient does not reach the latents, the guidance has no gradient, or none of the steps is at the noise
            level.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        objective: Objective,
        settings: LatentOptimisation = LatentOptimisation(),  # noqa: B008 - frozen
        *,
        gradient: Gradient | None = None,
        judge: Objective | None = None,
    ) -> None:
        objective.check()
        if judge is not None:
            judge.check()
            require_judge_differs(judge, objective)
        self.pipeline, self.objective, self.settings, self.judge = pipeline, objective, settings, judge
        sampling = pipeline.sampling
        require_differentiable(sampling.rule, "sampling.guidance")
        self.solver = pipeline.backbone.make_solver(sampling.solver or "DDIM", sampling.steps)
        timesteps = self.solver.timesteps
        if settings.from_timestep is not None:
            self.solver.check_timestep(settings.from_timestep, "optimisation.from_timestep")
            timesteps = [timestep for timestep in timesteps if timestep <= settings.from_timestep]
        self.from_timestep = None if settings.from_timestep == self.solver.timesteps[0] else settings.from_timestep
        default = Reversible() if isinstance(self.solver, GridSolver) else Checkpointed()
        self.gradient = default if gradient is None else gradient
        if (differentiated := self.gradient.num_steps(len(timesteps))) < len(timesteps):
            raise UserError(
                f"gradient {type(self.gradient).__name__} goes through {differentiated} of {len(timesteps)} steps and "
                "does not reach the latents; set it to Checkpointed"
            )

    def from_prompts(self, prompts: Sequence[str], seeds: Sequence[int]) -> Start:
        """Latents of B prompts and seeds at the noise level of the settings, under the pipeline's guidance."""
        with _constants():
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            model = self.pipeline.guided_model(self.pipeline.encode(prompts))
            latents = self.pipeline.backbone.initial_latents(generators, self.pipeline.sampling.size)
            if self.from_timestep is not None:
                latents = sample(
                    model, latents, solver=self.solver, generators=generators, to_timestep=self.from_timestep
                )
            return Start(latents, model, generators)

    def from_images(self, images: Tensor, seeds: Sequence[int], source_prompt: str = "") -> Start:
        """Latents from which a reversible solver gives images back as the autoencoder does.

        The inversion is without guidance. So is sampling, unless the pipeline's guidance is a rule: the scale of
        classifier-free guidance is for generated images.

        Args:
            images: (B, 3, H, W) in [0, 1].
            seeds: B seeds of the perturbations.
            source_prompt: what the images show; empty for the unconditional model.
        """
        backbone, guidance = self.pipeline.backbone, self.pipeline.sampling.guidance
        with _constants():
            source = self.pipeline.encode([source_prompt])
            unguided = self.pipeline.guided_model(source, ClassifierFreeGuidance(1.0))
            clean = backbone.encode_images(images.to(backbone.device, copy=True))
            latents = invert(unguided, clean, solver=self.solver, to_timestep=self.from_timestep)
            rule = None if isinstance(guidance, int | float) else guidance
            model = unguided if rule is None else self.pipeline.guided_model(source, rule)
            return Start(latents, model, [torch.Generator().manual_seed(seed) for seed in seeds])

    def generate(self, start: Start, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), nominally in [0, 1], of latents like those of a start; differentiable."""
        sampled = sample(
            start.model,
            latents,
            solver=self.solver,
            gradient=self.gradient,
            # A scheduler that adds noise adds the same noise every time.
            generators=[generator.clone_state() for generator in start.generators],
            from_timestep=self.from_timestep,
        )
        return self.pipeline.backbone.decode_latents(sampled)

    def optimise(
        self, start: Start, *, names: Sequence[str] = (), snapshots: Collection[int] = (), progress: str | None = None
    ) -> OptimisedLatents:
        """Optimise latents, each image for itself.

        Args:
            start: see :meth:`from_prompts` and :meth:`from_images`.
            names: names of the images in messages.
            snapshots: numbers of updates after which images are kept.
            progress: caption of a progress bar; None for no bar.

        Raises:
            UserError: if a loss is not finite, or has no gradient.
        """
        settings, latents = self.settings, start.latents
        generators = [generator.clone_state() for generator in start.generators]
        history: list[History] = [[] for _ in latents]
        images_after: dict[int, Tensor] = {}
        meter = Meter(progress or "", settings.steps, shown=progress is not None)
        with _constants(), meter:
            renormalise = settings.renormalisation(latents)
            buffer = torch.zeros_like(latents)
            for step in range(settings.steps + 1):
                last = step == settings.steps
                with torch.set_grad_enabled(not last):
                    latents = latents.detach().requires_grad_(not last)
                    images = self.generate(start, latents)
                    losses = self.objective(images, step)
                for name, rows, row in zip(
                    names or map(str, range(len(latents))),
                    history,
                    self.history_rows(step, images.detach(), losses.detach()),
                    strict=True,
                ):
                    _check_finite(row["loss"], name, step)
                    rows.append(row)
                if step in (0, settings.steps) or step in snapshots:
                    images_after[step] = finished(images.detach()).cpu()
                if not last:
                    latents, buffer = optimisation_step(
                        latents.detach(),
                        _gradient(losses, latents),
                        buffer,
                        grad_scale=settings.grad_scale,
                        clip=settings.clip,
                        momentum=settings.momentum,
                        perturbation=self._perturbation(latents, generators),
                        renormalise=renormalise,
                    )
                    meter.update(figures=f"loss {losses.detach().mean().item():.4f}")
        return OptimisedLatents(images_after[0], images_after[settings.steps], latents, history, images_after)

    def history_rows(self, step: int, images: Tensor, losses: Tensor) -> History:
        """A row of the history of each image: the loss, and with a judge the judge's confidence.

        Args:
            step: number of updates.
            images: (B, 3, H, W), nominally in [0, 1].
            losses: (B,).
        """
        rows: History = [{"step": step, "loss": loss} for loss in losses.tolist()]
        if self.judge is not None:
            for row, confidence in zip(rows, self.judge.confidence(images.clamp(0, 1)).tolist(), strict=True):
                row["judge"] = confidence
        return rows

    def _perturbation(self, latents: Tensor, generators: Sequence[torch.Generator]) -> Tensor | None:
        """Noise from a generator of each image, so that it does not depend on the rest of the batch.

        (B, C, h, w), or (B, 1, C, h, w) for both of each pair.
        """
        if not self.settings.noise:
            return None
        noise = torch.stack([torch.randn(latents.shape[-3:], generator=generator) for generator in generators])
        return self.settings.noise * (noise if latents.ndim == 4 else noise[:, None]).to(latents)


def sampling_for(sampling: Sampling, *, inverts: bool) -> Sampling:
    """Settings with a solver: the given solver, else DDIM, or EDICT where images are inverted.

    EDICT's pair is two copies of the latents. The other reversible solvers carry what large updates turn into blobs.

    Raises:
        UserError: if images are to be inverted by a scheduler.
    """
    solver = sampling.solver
    if solver is None:
        return dataclasses.replace(sampling, solver=EDICT() if inverts else "DDIM")
    if inverts and not isinstance(solver, ReversibleSolver):
        raise UserError(
            f"solver '{solver}' cannot invert photos exactly; set sampling.solver to EDICT, Leapfrog or OBELM"
        )
    return sampling


@contextmanager
def _constants() -> Iterator[None]:
    """No gradients, outside the inference mode of a Trainer, in which nothing could have a gradient even later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _gradient(losses: Tensor, latents: Tensor) -> Tensor:
    """Gradient of each image's loss by its latents."""
    if not losses.requires_grad:
        raise UserError(
            "the loss has no gradient in the latents; give an objective that depends on the images differentiably"
        )
    (gradient,) = torch.autograd.grad(losses, latents, torch.ones_like(losses))
    return gradient


def _check_finite(loss: float, name: str, step: int) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"the loss of image '{name}' is {loss} at step {step} of the optimisation; lower optimisation.grad_scale "
            "or optimisation.clip, or set trainer.precision to 32-true"
        )
