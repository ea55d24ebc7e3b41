"""Editing of given pictures, as the edit task and the tests of learned tokens both need it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenlearn.diffusion import invert, sample
from tokenlearn.errors import UserError
from tokenlearn.guidance import SummedGuidance
from tokenlearn.methods.base import inverse_of
from tokenlearn.models import Conditioning, DiffusionBackbone


class PictureEditor:
    """Inverts pictures to a noise level, and denoises them again under guidance by any number of conditions.

    Args:
        backbone: frozen diffusion model.
        num_inference_steps: steps of DDIM between clean pictures and pure noise, in either direction, of which those
            up to the timestep are made.
        timestep: noise level to invert to, one of the sampling steps'; more changes more.
        setting: the timestep's name in messages, such as ``model.timestep``.

    Raises:
        UserError: if the number of steps is out of range, or none of them is at the timestep.
    """

    def __init__(self, backbone: DiffusionBackbone, num_inference_steps: int, timestep: int, setting: str) -> None:
        self.backbone, self.num_inference_steps, self.timestep = backbone, num_inference_steps, timestep
        self.scheduler = backbone.make_scheduler("DDIM", num_inference_steps)
        self._inverse = inverse_of(self.scheduler)
        self.scheduler.set_timesteps(num_inference_steps)
        known: list[int] = self.scheduler.timesteps.tolist()
        if timestep not in known:
            near = sorted(sorted(known, key=lambda step: abs(step - timestep))[:2])
            raise UserError(
                f"{setting} {timestep} is not among the {num_inference_steps} steps; take "
                f"{' or '.join(map(str, near))}, or another number of steps"
            )

    def invert(self, latents: Tensor, unconditional: Conditioning) -> Tensor:
        """Latents (B, C, h, w) at the noise level of the edits, from clean ones."""
        return invert(self.backbone, self._inverse, latents, [unconditional], self.num_inference_steps, self.timestep)

    def denoise(
        self,
        noisy: Tensor,
        unconditional: Conditioning,
        conditionals: Sequence[Conditioning],
        scales: Sequence[Tensor],
    ) -> Tensor:
        """Edited images (B, 3, H, W) in [0, 1] from inverted latents.

        Args:
            noisy: (B, C, h, w), see :meth:`invert`.
            unconditional: one row for the empty prompt.
            conditionals: one row for each condition.
            scales: () or (B,) signed guidance scale of each condition.
        """
        guidance = SummedGuidance(scales)
        edited = sample(
            self.backbone,
            self.scheduler,
            noisy,
            guidance.conditionings(unconditional, *conditionals),
            guidance,
            self.num_inference_steps,
            gradient_steps=0,
            from_timestep=self.timestep,
        )
        return self.backbone.decode_latents(edited).clamp(0, 1)
