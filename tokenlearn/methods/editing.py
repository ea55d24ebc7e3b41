"""Editing of given pictures, as the edit task and the tests of learned tokens both need it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from tokenlearn.diffusion import Inverted, edit_friendly_noise, invert, invert_full_chain, sample, sample_full_chain
from tokenlearn.errors import UserError
from tokenlearn.guidance import SummedGuidance
from tokenlearn.methods.base import inverse_of
from tokenlearn.models import Conditioning, DiffusionBackbone

Inversion = Literal["ddim", "edit_friendly", "edict", "leapfrog", "o_belm"]
"""How pictures are inverted.

``ddim``
    Deterministic; it comes back to a picture in the limit of many steps.
``edit_friendly``
    Noise for every step, which leads back exactly, see :func:`tokenlearn.diffusion.edit_friendly_noise`.
``edict``, ``leapfrog``, ``o_belm``
    Chains that are followed back exactly, without noise, see :data:`tokenlearn.diffusion.full_chain.GradientChain`.
"""

# Noise of every picture alike: its edits depend neither on the pictures beside it nor on those that are done.
_SEED = 0


def check_timestep(timestep: int, known: Sequence[int], setting: str) -> None:
    """Refuse a timestep that none of the sampling steps has.

    Raises:
        UserError: naming the setting and the nearest ones.
    """
    if timestep not in known:
        near = sorted(sorted(known, key=lambda step: abs(step - timestep))[:2])
        raise UserError(
            f"{setting} {timestep} is not among the {len(known)} steps; take {' or '.join(map(str, near))}, or "
            "another number of steps"
        )


class PictureEditor:
    """Inverts pictures to a noise level, and denoises them again under guidance by any number of conditions.

    Args:
        backbone: frozen diffusion model.
        num_inference_steps: steps of DDIM between clean pictures and pure noise, in either direction, of which those
            up to the timestep are made.
        timestep: noise level to invert to, one of the sampling steps'; more changes more.
        setting: the timestep's name in messages, such as ``model.timestep``.
        inversion: how.

    Raises:
        UserError: if the number of steps is out of range, or none of them is at the timestep.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        num_inference_steps: int,
        timestep: int,
        setting: str,
        inversion: Inversion = "ddim",
    ) -> None:
        self.backbone, self.num_inference_steps, self.timestep = backbone, num_inference_steps, timestep
        self.inversion = inversion
        self.scheduler = backbone.make_scheduler("DDIM", num_inference_steps)
        self._inverse = inverse_of(self.scheduler)
        self.scheduler.set_timesteps(num_inference_steps)
        check_timestep(timestep, self.scheduler.timesteps.tolist(), setting)

    def invert(self, latents: Tensor, unconditional: Conditioning) -> Inverted:
        """Clean latents (B, C, h, w) at the noise level of the edits."""
        if self.inversion == "ddim":
            steps = self.num_inference_steps
            return Inverted(invert(self.backbone, self._inverse, latents, [unconditional], steps, self.timestep))
        plain = SummedGuidance([])
        settings = (self.backbone, self.scheduler, latents, [unconditional], plain, self.num_inference_steps)
        if self.inversion == "edit_friendly":
            generators = [torch.Generator().manual_seed(_SEED) for _ in latents]
            return edit_friendly_noise(*settings, generators, self.timestep)
        return Inverted(invert_full_chain(*settings, self.inversion, self.timestep))

    def denoise(
        self,
        noisy: Inverted,
        unconditional: Conditioning,
        conditionals: Sequence[Conditioning],
        scales: Sequence[Tensor],
    ) -> Tensor:
        """Edited images (B, 3, H, W) in [0, 1] from inverted latents.

        Args:
            noisy: B rows, see :meth:`invert`.
            unconditional: one row for the empty prompt.
            conditionals: one row for each condition.
            scales: () or (B,) signed guidance scale of each condition.
        """
        guidance = SummedGuidance(scales)
        return self.denoise_by(noisy, guidance.conditionings(unconditional, *conditionals), guidance)

    def denoise_by(
        self,
        noisy: Inverted,
        conditionings: Sequence[Conditioning],
        combine: Callable[[Sequence[Tensor], int], Tensor],
    ) -> Tensor:
        """The same under any guidance rule.

        Args:
            noisy: B rows, see :meth:`invert`.
            conditionings: what the network is evaluated for, each of B rows or of one row.
            combine: see :func:`tokenlearn.diffusion.sample`.
        """
        settings = (self.backbone, self.scheduler, noisy.latents, conditionings, combine, self.num_inference_steps)
        if self.inversion == "ddim" or self.inversion == "edit_friendly":
            edited = sample(*settings, gradient_steps=0, step_options=noisy.step_options, from_timestep=self.timestep)
        else:
            edited = sample_full_chain(*settings, self.inversion, self.timestep)
        return self.backbone.decode_latents(noisy.finish(edited)).clamp(0, 1)
