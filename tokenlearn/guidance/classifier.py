"""Classifier guidance: every step of the sampler descends an objective of the image that it predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

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

    ``e`` being the prediction under classifier-free guidance. Where alpha is 0, at the first step of models with zero
    terminal SNR, the latents are the noise and no prediction of it can change: the step is classifier-free guidance
    alone. The result has no gradient.

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
        sigma = process.sigma(timestep)
        with torch.enable_grad():
            noisy = latents.detach().requires_grad_()
            plain = model.prediction(0, noisy, timestep)
            blended = sigma * process.x0(noisy, plain, timestep) + (1 - sigma) * noisy
            losses = self.objective(model.decode(blended), int(timestep))
            (gradient,) = torch.autograd.grad(losses.sum(), noisy)
        with torch.no_grad():
            # Kinds of prediction are affine in each other, so classifier-free guidance is the same in any.
            guided = self([plain.detach(), model.prediction(1, latents, timestep)], step)
            return guided + process.change_of_prediction(self.scale * sigma * gradient, timestep)
