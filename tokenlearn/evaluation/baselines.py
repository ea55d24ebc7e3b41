"""Cheaper rivals of optimised latents, on the same pipeline, objective and solver."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierGuidance
from tokenlearn.latent_optimiser import LatentOptimiser, Start
from tokenlearn.models import Conditioning


@torch.no_grad()
def best_of(optimiser: LatentOptimiser, start: Start, candidates: int) -> Tensor:
    """Best of several images for each seed, by the objective.

    Args:
        optimiser: generates the images and has the objective.
        start: first latents of B images at the first noise level. Their generators are advanced for the others.
        candidates: number of images to choose from, the first of ``start`` among them.

    Returns:
        (B, 3, H, W) images in [0, 1].

    Raises:
        UserError: if a loss is not finite.
    """
    backbone, size = optimiser.pipeline.backbone, optimiser.pipeline.sampling.size
    best, lowest = torch.empty(0), torch.full((len(start.latents),), math.inf, device=start.latents.device)
    for candidate in range(candidates):
        latents = backbone.initial_latents(start.generators, size) if candidate else start.latents
        images = optimiser.generate(start, latents)
        losses = optimiser.objective(images, candidate)
        if not losses.isfinite().all():
            raise UserError(
                f"the loss of candidate {candidate} is {losses.tolist()}; set trainer.precision to 32-true"
            )
        better = losses < lowest
        images, lowest = images.clamp(0, 1), torch.where(better, losses, lowest)
        best = torch.where(better[:, None, None, None], images, best) if candidate else images
    return best


@torch.no_grad()
def one_step(
    optimiser: LatentOptimiser, start: Start, prompt: Conditioning, *, scale: float, guidance_scale: float
) -> Tensor:
    """Images by one-step classifier guidance (:class:`ClassifierGuidance`) from the same latents.

    Args:
        optimiser: generates the images and has the objective.
        start: latents of B images.
        prompt: conditioning of the images' prompts.
        scale: strength of the guidance.
        guidance_scale: classifier-free guidance scale.

    Returns:
        (B, 3, H, W) images in [0, 1].
    """
    rule = ClassifierGuidance(optimiser.objective, scale, guidance_scale)
    guided = start._replace(model=optimiser.pipeline.guided_model(prompt, rule))
    return optimiser.generate(guided, start.latents).clamp(0, 1)


def candidates_at_equal_cost(updates: int) -> int:
    """Number of candidates of :func:`best_of` at the cost of an optimisation.

    An update evaluates the network twice per sampling step, and its backward pass costs as much as two evaluations.
    """
    return 4 * updates
