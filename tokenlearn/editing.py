"""Invert images to a noise level, and denoise them again under another guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tokenlearn.diffusion import (
    Inverted,
    ReversibleSolver,
    SchedulerSolver,
    Solver,
    edit_friendly_noise,
    invert,
    sample,
)
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.guidance import ComposableGuidance, GuidedModel
from tokenlearn.models import Conditioning, DiffusionBackbone
from tokenlearn.pipeline import Pipeline, finished

if TYPE_CHECKING:
    from tokenlearn.tokens import TokenBank


Inversion = Literal["ddim", "edit_friendly"] | ReversibleSolver
"""How images are inverted.

``ddim``
    Deterministic; it returns to an image only in the limit of many steps.
``edit_friendly``
    Noise for every step, which leads back exactly, see :func:`tokenlearn.diffusion.edit_friendly_noise`.
a reversible solver, such as :class:`tokenlearn.diffusion.EDICT`
    Exact without noise, see :func:`tokenlearn.diffusion.invert`.
"""

# Every image gets the same noise, so an edit depends neither on the rest of the batch nor on the order of images.
_SEED = 0


@dataclass(frozen=True)
class Editing:
    """Settings of the inversion and denoising of an image.

    Attributes:
        timestep: noise level to invert to, one of the sampling steps'; a higher level changes more.
        steps: sampling steps between a clean image and pure noise. An edit makes the steps up to the timestep.
        inversion: ``ddim`` is deterministic and returns to the image only in the limit of many steps;
            ``edit_friendly`` (https://arxiv.org/abs/2304.06140) returns exactly where nothing is edited, so images
            keep their details, and so do the reversible solvers ``EDICT``, ``Leapfrog`` and ``OBELM``, without noise.
            The last noise of ``edit_friendly`` is kept, which its authors' code sets to 0.
        source_prompt: what the image shows, such as ``a portrait``; empty for the unconditional model.

    Raises:
        UserError: if there are no steps, or the inversion is unknown.
    """

    timestep: int = 601
    steps: int = 50
    inversion: Inversion = "ddim"
    source_prompt: str = ""

    def __post_init__(self) -> None:
        check_at_least("editing", 1, steps=self.steps)
        if not isinstance(self.inversion, ReversibleSolver) and self.inversion not in ("ddim", "edit_friendly"):
            raise UserError(
                f"editing.inversion must be ddim, edit_friendly, or a reversible solver such as EDICT, got "
                f"{self.inversion!r}"
            )


class ImageEditor:
    """Inverts images to a noise level once, and denoises them under any guidance, any number of times.

    Args:
        backbone: frozen diffusion model.
        editing: settings.
        setting: name of the settings in messages, such as ``model.editing``.

    Attributes:
        backbone, editing: as given.
        solver: solver that denoises.

    Raises:
        UserError: if the number of steps is not possible, or none of the steps is at the timestep.
    """

    def __init__(self, backbone: DiffusionBackbone, editing: Editing, *, setting: str = "editing") -> None:
        self.backbone, self.editing = backbone, editing
        inversion = editing.inversion
        self.solver: Solver = (
            backbone.make_solver(inversion, editing.steps)
            if isinstance(inversion, ReversibleSolver)
            else backbone.make_editing_solver(editing.steps)
        )
        self.solver.check_timestep(editing.timestep, f"{setting}.timestep")

    @property
    def num_steps(self) -> int:
        """Number of steps that denoise an inverted image."""
        return sum(timestep <= self.editing.timestep for timestep in self.solver.timesteps)

    def invert(self, latents: Tensor, source: Conditioning) -> Inverted:
        """Clean latents (B, C, h, w) at the noise level of the settings.

        Args:
            latents: (B, C, h, w) clean latents.
            source: conditioning of what the images show, of one row or B rows.

        Returns:
            B rows, from which :meth:`denoise` returns to the images under the same conditioning without guidance.
        """
        model = GuidedModel(self.backbone, ComposableGuidance([]), [source])
        inversion, timestep = self.editing.inversion, self.editing.timestep
        if inversion == "edit_friendly":
            assert isinstance(self.solver, SchedulerSolver)
            generators = [torch.Generator().manual_seed(_SEED) for _ in latents]
            return edit_friendly_noise(
                model, latents, solver=self.solver, generators=generators, from_timestep=timestep
            )
        if inversion == "ddim":
            inverse = self.backbone.make_inverse_solver(self.editing.steps)
            return Inverted(invert(model, latents, solver=inverse, to_timestep=timestep))
        return Inverted(invert(model, latents, solver=self.solver, to_timestep=timestep))

    def denoise(self, noisy: Inverted, model: GuidedModel[Conditioning]) -> Tensor:
        """Edited images (B, 3, H, W) in [0, 1].

        Args:
            noisy: B rows, see :meth:`invert`.
            model: guided model, see :meth:`tokenlearn.pipeline.Pipeline.guided_model`.
        """
        edited = sample(
            model,
            noisy.latents,
            solver=self.solver,
            step_options=noisy.step_options,
            from_timestep=self.editing.timestep,
        )
        return finished(self.backbone.decode_latents(noisy.finish(edited)))

    def denoise_towards(
        self,
        noisy: Inverted,
        source: Conditioning,
        conditions: Sequence[Conditioning],
        scales: Sequence[float | Tensor],
    ) -> Tensor:
        """Edited images (B, 3, H, W) in [0, 1], moved from the source towards conditions or away from them.

        The guidance is ``e_0 + sum_a s_a (e_a - e_0)``, the editing of CASO (https://arxiv.org/abs/2505.14254), see
        :func:`tokenlearn.guidance.composable_guidance`.

        Args:
            noisy: B rows, see :meth:`invert`.
            source: conditioning of ``e_0``, with which the images were inverted.
            conditions: one row for each condition ``e_a``.
            scales: signed scale ``s_a`` of each condition, a number or (B,).
        """
        rule = ComposableGuidance(scales)
        return self.denoise(noisy, GuidedModel(self.backbone, rule, rule.conditionings(source, *conditions)))

    def edit(
        self,
        noisy: Inverted,
        edits: Sequence[Mapping[str, float]],
        *,
        pipeline: Pipeline,
        source: Conditioning,
        template: str = "{}",
        batch_size: int = 8,
    ) -> Tensor:
        """Images (E, 3, H, W) in [0, 1] of one inverted image, one for each edit.

        Edits of the same tokens share a batch.

        Args:
            noisy: one row, see :meth:`invert`.
            edits: token or words to signed scale, one mapping for each edit.
            pipeline: pipeline that knows the tokens.
            source: conditioning with which the image was inverted.
            template: prompt with ``{}`` where the token goes.
            batch_size: images at once.
        """
        indices_of: dict[tuple[str, ...], list[int]] = {}
        for index, edit in enumerate(edits):
            indices_of.setdefault(tuple(sorted(edit)), []).append(index)
        images: dict[int, Tensor] = {}
        for tokens, indices in indices_of.items():
            for start in range(0, len(indices), batch_size):
                part = indices[start : start + batch_size]
                conditions = [pipeline.encode([template.format(token)]) for token in tokens]
                scales = [torch.tensor([edits[index][token] for index in part]) for token in tokens]
                edited = self.denoise_towards(noisy.expand(len(part)), source, conditions, scales)
                images |= zip(part, edited, strict=True)
        return torch.stack([images[index] for index in range(len(edits))])


def strengths_of(
    edit: Mapping[str, float], tokens: TokenBank | None, calibrated: bool, setting: str = "calibrated"
) -> dict[str, float]:
    """Strengths of an edit, from calibrated ones if these are given.

    Args:
        edit: token or words to strength.
        tokens: bank with the calibrations.
        calibrated: whether the strengths are calibrated ones.
        setting: name of the setting in messages.

    Raises:
        UserError: if a token has not been calibrated, or a strength is out of its range.
    """
    if not calibrated:
        return dict(edit)
    calibrations = {} if tokens is None else tokens.calibrations
    for token in edit:
        if token not in calibrations:
            raise UserError(
                f"{setting} is true, but '{token}' has no calibrated strengths, only "
                f"{', '.join(calibrations) or 'none'} have; run 'tokenlearn calibrate' on its file, or set {setting} "
                "to false"
            )
    return {token: calibrations[token].strength(strength) for token, strength in edit.items()}


def source_of(pipeline: Pipeline, editing: Editing) -> Conditioning:
    """Conditioning of what images show: of the source prompt, or of the unconditional model without one."""
    return pipeline.encode([editing.source_prompt]) if editing.source_prompt else pipeline.unconditional()
