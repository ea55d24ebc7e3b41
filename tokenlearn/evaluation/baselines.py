"""Cheaper rivals of optimised latents, on the same pipeline, objective and solver."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenlearn.errors import UserError
from tokenlearn.guidance import GuidanceRule
from tokenlearn.latent_optimiser import LatentOptimiser, Start
from tokenlearn.models import Conditioning


class _Best:
    """The best image so far of each of B seeds, with the latents that it comes from."""

    def __init__(self, optimiser: LatentOptimiser, start: Start) -> None:
        self.optimiser, self.start = optimiser, start
        self.images = torch.empty(0)
        self.latents = start.latents
        self.losses = torch.full((len(start.latents),), math.inf, device=start.latents.device)
        self._tried = 0

    def offer(self, latents: Tensor) -> None:
        """Sample latents, and keep those of each seed whose image has a lower loss than its best."""
        images = self.optimiser.generate(self.start, latents)
        losses = self.optimiser.objective(images, self._tried)
        if not losses.isfinite().all():
            raise UserError(
                f"the loss of candidate {self._tried} is {losses.tolist()}; set trainer.precision to 32-true"
            )
        better, images = losses < self.losses, images.clamp(0, 1)
        self.images = torch.where(_rows(better, images), images, self.images) if self._tried else images
        self.latents = torch.where(_rows(better, latents), latents, self.latents)
        self.losses = losses.minimum(self.losses)
        self._tried += 1


def _rows(chosen: Tensor, like: Tensor) -> Tensor:
    """Truth values (B,) in a shape that broadcasts over images, latents or pairs of latents."""
    return chosen.reshape(-1, *[1] * (like.ndim - 1))


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
    return local_search(optimiser, start, candidates, random=candidates, angle=0.0)


@torch.no_grad()
def local_search(optimiser: LatentOptimiser, start: Start, candidates: int, *, random: int, angle: float) -> Tensor:
    """Best of several random images for each seed, and then of images whose latents are near the best ones.

    Zero-order search (Ma et al., 2025, https://arxiv.org/abs/2501.09732): the best latents are rotated
    towards new noise, and replaced where that is better. A rotation leaves them standard normal.

    Args:
        optimiser: generates the images and has the objective.
        start: first latents of B images at the first noise level. Their generators are advanced for the others.
        candidates: number of images in all, the first of ``start`` among them.
        random: how many of them are independent; the others are near the best so far.
        angle: of the rotation, in radians.

    Returns:
        (B, 3, H, W) images in [0, 1].

    Raises:
        UserError: if a loss is not finite.
    """
    backbone, size = optimiser.pipeline.backbone, optimiser.pipeline.sampling.size
    best = _Best(optimiser, start)
    best.offer(start.latents)
    for candidate in range(1, candidates):
        noise = backbone.initial_latents(start.generators, size)
        best.offer(noise if candidate < random else rotated(best.latents, noise, angle))
    return best.images


def rotated(latents: Tensor, noise: Tensor, angle: float) -> Tensor:
    """Latents turned towards noise, ``cos(angle) z + sin(angle) n``: standard normal if both are.

    Args:
        latents: any shape.
        noise: same shape.
        angle: in radians.
    """
    return math.cos(angle) * latents + math.sin(angle) * noise


@torch.no_grad()
def best_of_guided(
    optimiser: LatentOptimiser, start: Start, prompt: Conditioning, rule: GuidanceRule, candidates: int = 1
) -> Tensor:
    """Best of several images under a guidance rule for each seed, by the objective.

    Args:
        optimiser: generates the images and has the objective.
        start: latents of B images; as in :func:`best_of` if there is more than one candidate.
        prompt: conditioning of the images' prompts.
        rule: how each image is guided.
        candidates: number of images to choose from.

    Returns:
        (B, 3, H, W) images in [0, 1].

    Raises:
        UserError: if a loss is not finite.
    """
    return best_of(optimiser, start._replace(model=optimiser.pipeline.guided_model(prompt, rule)), candidates)


def candidates_at_equal_cost(updates: int) -> int:
    """Number of candidates of :func:`best_of` at the cost of an optimisation.

    An update evaluates the network twice per sampling step, and its backward pass costs as much as two evaluations.
    """
    return 4 * updates
