"""Classifier guidance: every step of the sampler descends an objective of the image that it predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenlearn.diffusion.process import x0_from_noise
from tokenlearn.errors import UserError
from tokenlearn.guidance.base import C, GuidanceRule, Predictor
from tokenlearn.guidance.classifier_free import classifier_free_guidance
from tokenlearn.losses.objective import Objective


class ClassifierGuidance(GuidanceRule):
    """One-step classifier guidance, the cheap rival of optimised latents.

    Classifier guidance (Dhariwal and Nichol, 2021, https://arxiv.org/abs/2105.05233, algorithm 2) with an objective of
    clean images, as in the released code of DOODL. With the unconditional prediction ``e_0`` at the latents
    ``z = alpha x0 + sigma e`` and the clean latents ``x0`` that it predicts,

        e <- e + s sigma grad_z l(decode(sigma x0 + (1 - sigma) z)),

    ``e`` being the prediction under classifier-free guidance. The result has no gradient.

    Args:
        objective: loss of images.
        scale: ``s``.
        guidance_scale: classifier-free guidance scale.

    Raises:
        UserError: if a scale is not finite.
    """

    differentiable = False

    def __init__(self, objective: Objective, scale: float = 100.0, guidance_scale: float = 7.5) -> None:
        for name, number in {"scale": scale, "guidance_scale": guidance_scale}.items():
            if not math.isfinite(number):
                raise UserError(f"{name} of ClassifierGuidance must be a finite number, got {number}")
        self.objective, self.scale, self.guidance_scale = objective, scale, guidance_scale

    def conditionings(self, unconditional: C, prompt: C, *concepts: C) -> list[C]:
        """See :class:`GuidanceRule`."""
        return [unconditional, prompt]

    def __call__(self, predictions: Sequence[Tensor], step: int) -> Tensor:
        """Classifier-free guidance alone."""
        unconditional, conditional = predictions
        return classifier_free_guidance(unconditional, conditional, self.guidance_scale)

    def guide(self, model: Predictor, latents: Tensor, timestep: Tensor, step: int, recompute: bool = False) -> Tensor:
        """See :class:`GuidanceRule`; crops of the objective are named by the timestep."""
        process = model.process
        alpha, sigma = process.alpha(timestep), process.sigma(timestep)
        with torch.enable_grad():
            noisy = latents.detach().requires_grad_()
            plain = process.noise(noisy, model.prediction(0, noisy, timestep), timestep)
            blended = sigma * x0_from_noise(noisy, plain, alpha, sigma) + (1 - sigma) * noisy
            losses = self.objective(model.decode(blended), int(timestep))
            (gradient,) = torch.autograd.grad(losses.sum(), noisy)
        with torch.no_grad():
            prompted = process.noise(latents, model.prediction(1, latents, timestep), timestep)
            guided = self([plain.detach(), prompted], step)
            return process.prediction(latents, guided + self.scale * sigma * gradient, timestep)
