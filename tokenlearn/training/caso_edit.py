"""Edits of images by tokens, as CASO trains them: in one step, or by the sampler.

With ``z_t`` the noised latents of an image, the one-step edit is the prediction of the clean latents under guidance
(``z`` in :mod:`tokenlearn.losses.caso`). With a gradient through the sampler, the edit is sampled from ``z_t`` to the
end instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from tokenlearn.diffusion import Gradient, OneStep, Solver, invert, sample
from tokenlearn.diffusion.solvers.base import nearest
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance, GuidanceRule, GuidedModel, require_differentiable
from tokenlearn.models import Conditioning
from tokenlearn.pipeline import Pipeline
from tokenlearn.training.base import check_gradient

Noising = Literal["forward", "inversion"]
"""Ways from an image to a noise level."""


@dataclass(frozen=True)
class TrainingEdit:
    """How images are edited in training.

    Attributes:
        timesteps: timestep that images are noised to; or the first and the last timestep of a range, from which one is
            chosen for each image. The published code always takes 401 of 1000.
        noising: ``forward`` adds fresh noise, ``inversion`` is DDIM inversion in ``sampling.steps`` steps.
        guidance: guidance rule of the edit, or the scale of classifier-free guidance.
        gradient: null edits in one step. A gradient, such as :class:`LastK` or :class:`Checkpointed`, samples the edit
            from the noised latents to the end, in the remaining steps of DDIM with ``sampling.steps`` steps, and goes
            back through them. :class:`Reversible` takes the reversible solver of ``sampling`` in place of DDIM.

    Raises:
        UserError: if the guidance would not act in one step, or has no gradient.
    """

    timesteps: int | tuple[int, int] = 401
    noising: Noising = "forward"
    guidance: GuidanceRule | float = 10.0
    gradient: Gradient | None = None

    def __post_init__(self) -> None:
        require_differentiable(self.rule, "edit.guidance")
        if isinstance(self.gradient, OneStep):
            raise UserError("edit.gradient OneStep is for class tokens; set it to null, which edits in one step")
        if self.gradient is None:
            self.rule.check_steps(1)

    @property
    def rule(self) -> GuidanceRule:
        """The guidance rule."""
        return self.guidance if isinstance(self.guidance, GuidanceRule) else ClassifierFreeGuidance(self.guidance)


class Edits(ABC):
    """Edits of B noised images by prompts.

    Args:
        pipeline: backbone, tokens and negative prompt.
        rule: guidance rule.
        noisy: (B, C, h, w) noised latents ``z_t``.
        timesteps: (B,) noise levels.

    Attributes:
        noisy, timesteps: as given.
    """

    def __init__(self, pipeline: Pipeline, rule: GuidanceRule, noisy: Tensor, timesteps: Tensor) -> None:
        self._pipeline, self._rule = pipeline, rule
        self.noisy, self.timesteps = noisy, timesteps
        self._unconditional = pipeline.unconditional()

    def __len__(self) -> int:
        return len(self.noisy)

    @abstractmethod
    def edited(self, prompts: Sequence[str]) -> Tensor:
        """Latents ``z`` (B, C, h, w) of the edits by B prompts, differentiable by the tokens."""

    @abstractmethod
    def unedited(self, rows: Sequence[int]) -> Tensor:
        """Latents (n, C, h, w) of n rows, denoised without prompt and guidance; a constant."""

    def together(self) -> AbstractContextManager[None]:
        """While further edits of the same images are made, which then share what does not depend on the prompt."""
        return nullcontext()

    def _guided_model(self, prompt: Conditioning) -> GuidedModel[Conditioning]:
        concepts = [self._pipeline.encode([concept]) for concept in self._rule.concept_prompts]
        conditionings = self._rule.conditionings(self._unconditional, prompt, *concepts)
        return GuidedModel(self._pipeline.backbone, self._rule, conditionings)


class OneStepEdits(Edits):
    """Edits in one step; the prediction without prompt is evaluated once for all of them.

    A rule with its own :meth:`GuidanceRule.guide` asks the model for predictions itself, so it gets no shared one.
    """

    @cached_property
    @torch.no_grad()
    def unconditional_prediction(self) -> Tensor:
        """Prediction (B, C, h, w) of the network without prompt."""
        conditioning = self._unconditional.expand(len(self))
        prediction: Tensor = self._pipeline.backbone(self.noisy, self.timesteps, conditioning)
        return prediction

    def edited(self, prompts: Sequence[str]) -> Tensor:
        """See :class:`Edits`: ``z = (z_t - sigma_t eps_s) / alpha_t``."""
        with self.together():
            model = self._guided_model(self._pipeline.encode(prompts))
            if type(model.rule).guide is not GuidanceRule.guide:
                guided = model(self.noisy, self.timesteps, 0)
            else:
                known = {
                    index: self.unconditional_prediction
                    for index, conditioning in enumerate(model.conditionings)
                    if conditioning is self._unconditional
                }
                guided = model.rule(model.predictions(self.noisy, self.timesteps, 0, known=known), 0)
        return model.process.x0(self.noisy, guided, self.timesteps)

    @torch.no_grad()
    def unedited(self, rows: Sequence[int]) -> Tensor:
        """See :class:`Edits`."""
        chosen = list(rows)
        process = self._pipeline.backbone.process
        return process.x0(self.noisy[chosen], self.unconditional_prediction[chosen], self.timesteps[chosen])

    def together(self) -> AbstractContextManager[None]:
        """See :class:`Edits`."""
        return self._pipeline.backbone.same_latents()


class SampledEdits(Edits):
    """Edits by the sampler, from the noise level of each image to the end.

    Args:
        pipeline: backbone, tokens and negative prompt.
        rule: guidance rule.
        noisy: (B, C, h, w) noised latents ``z_t``.
        timesteps: (B,) noise levels, at which the solver can start.
        solver: solver of the edits.
        gradient: how the gradient goes back.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        rule: GuidanceRule,
        noisy: Tensor,
        timesteps: Tensor,
        *,
        solver: Solver,
        gradient: Gradient,
    ) -> None:
        super().__init__(pipeline, rule, noisy, timesteps)
        self._solver, self._gradient = solver, gradient

    def edited(self, prompts: Sequence[str]) -> Tensor:
        """See :class:`Edits`."""
        return self._sampled(self._pipeline.encode(prompts), list(range(len(self))), self._gradient)

    @torch.no_grad()
    def unedited(self, rows: Sequence[int]) -> Tensor:
        """See :class:`Edits`."""
        return self._sampled(None, list(rows), None)

    def _sampled(self, prompts: Conditioning | None, rows: list[int], gradient: Gradient | None) -> Tensor:
        """Latents (n, C, h, w) of n rows; without prompts, they are denoised without guidance."""
        rows_at = torch.tensor(rows, device=self.noisy.device)
        timesteps = self.timesteps[rows_at]
        parts, places = [], []
        for timestep in sorted(set(timesteps.tolist())):  # images at one noise level go through the sampler together
            place = (timesteps == timestep).nonzero().flatten()
            if prompts is None:
                backbone, unguided = self._pipeline.backbone, ClassifierFreeGuidance(1.0)
                model = GuidedModel(backbone, unguided, [self._unconditional])
            else:
                model = self._guided_model(prompts[rows_at[place]])
            noisy = self.noisy[rows_at[place]]
            parts.append(sample(model, noisy, solver=self._solver, gradient=gradient, from_timestep=timestep))
            places.append(place)
        return torch.cat(parts)[torch.cat(places).argsort()]


class Editor:
    """Noises images and edits them, with the settings of a training.

    Args:
        pipeline: backbone, tokens, negative prompt and number of sampling steps.
        settings: how images are edited.

    Attributes:
        timesteps: the timesteps that images may be noised to.

    Raises:
        UserError: if no timestep is possible, or the gradient does not go with the solver or the guidance.
    """

    def __init__(self, pipeline: Pipeline, settings: TrainingEdit) -> None:
        self.pipeline, self.settings = pipeline, settings
        backbone, sampling = pipeline.backbone, pipeline.sampling
        self._inverse = backbone.make_inverse_solver(sampling.steps) if settings.noising == "inversion" else None
        self._solver: Solver | None = None
        if settings.gradient is not None:
            solver = sampling.solver if settings.gradient.needs_reversible_solver else "DDIM"
            check_gradient(
                settings.gradient,
                solver,
                settings.rule,
                setting="model.edit.gradient",
                solver_setting="model.sampling.solver",
                guidance_setting="model.edit.guidance",
            )
            self._solver = (
                backbone.make_solver(solver, sampling.steps)
                if settings.gradient.needs_reversible_solver
                else backbone.make_editing_solver(sampling.steps)
            )
        self.timesteps = self._possible_timesteps()
        if self._solver is not None:
            settings.rule.check_steps(sum(timestep <= self.timesteps[0] for timestep in self._solver.timesteps))

    @torch.no_grad()
    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noised latents (B, C, h, w).

        Args:
            latents: (B, C, h, w) clean latents ``z_0``.
            noise: (B, C, h, w) noise to add; inversion does not use it.
            timesteps: (B,) noise levels.
        """
        if self._inverse is None:
            return self.pipeline.backbone.process.add_noise(latents, noise, timesteps)
        reached: list[Tensor] = []
        invert(
            self.pipeline.guided_model(self.pipeline.unconditional(), ClassifierFreeGuidance(1.0)),
            latents,
            solver=self._inverse,
            to_timestep=int(timesteps.max()),
            callback=lambda step, inverted: reached.append(inverted),
        )
        levels = self._inverse.timesteps
        steps = [levels.index(timestep) for timestep in timesteps.tolist()]
        return torch.stack([reached[step][row] for row, step in enumerate(steps)])

    def edits(self, noisy: Tensor, timesteps: Tensor) -> Edits:
        """Edits of noised latents (B, C, h, w) at (B,) noise levels."""
        rule, gradient = self.settings.rule, self.settings.gradient
        if gradient is None or self._solver is None:
            return OneStepEdits(self.pipeline, rule, noisy, timesteps)
        return SampledEdits(self.pipeline, rule, noisy, timesteps, solver=self._solver, gradient=gradient)

    def _possible_timesteps(self) -> list[int]:
        """Timesteps in the range of the settings that noising reaches and edits start from."""
        bounds = self.settings.timesteps
        first, last = (bounds, bounds) if isinstance(bounds, int) else bounds
        most = self.pipeline.backbone.process.num_timesteps - 1
        if not 0 < first <= last <= most:
            raise UserError(f"edit.timesteps must be from 1 to {most}, the first not above the last, got {bounds}")
        grids = [solver.timesteps for solver in (self._inverse, self._solver) if solver is not None]
        if not grids:
            return list(range(first, last + 1))
        levels = sorted(set(grids[0]).intersection(*grids))
        possible = [timestep for timestep in levels if first <= timestep <= last]
        if not possible:
            raise UserError(
                f"edit.timesteps {bounds} has no timestep of {self.pipeline.sampling.steps} sampling steps; take "
                f"{nearest(first, levels)}, or another number of steps"
            )
        return possible
