import math

import pytest
import torch

from tokenlearn.diffusion.latent_optimisation import LatentOptimisation
from tokenlearn.evaluation.baselines import best_of, candidates_at_equal_cost, local_search, rotated
from tokenlearn.latent_optimiser import LatentOptimiser
from tokenlearn.models import StableDiffusion
from tokenlearn.objectives import SymmetryLoss
from tokenlearn.pipeline import Pipeline, Sampling


@torch.no_grad()
def test_best_of_takes_the_image_with_the_lowest_loss(tiny_models):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    pipeline = Pipeline(backbone, sampling=Sampling(3, 3.0))
    optimiser = LatentOptimiser(pipeline, SymmetryLoss(), LatentOptimisation(steps=3))
    found = best_of(optimiser, optimiser.from_prompts(["a portrait"] * 2, [3, 5]), 4)
    for row, seed in enumerate((3, 5)):
        generator = torch.Generator().manual_seed(seed)
        start = optimiser.from_prompts(["a portrait"], [seed])
        images = [optimiser.generate(start, backbone.initial_latents([generator])) for _ in range(4)]
        losses = [SymmetryLoss()(image).item() for image in images]
        best = images[losses.index(min(losses))]
        torch.testing.assert_close(found[row], best[0].clamp(0, 1), rtol=1e-3, atol=1e-3)
        assert len(set(losses)) == 4


@torch.no_grad()
def test_local_search_follows_the_best_latents(tiny_models):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    optimiser = LatentOptimiser(Pipeline(backbone, sampling=Sampling(3, 3.0)), SymmetryLoss())
    found = local_search(optimiser, optimiser.from_prompts(["a portrait"], [3]), 12, random=2, angle=0.5)

    generator = torch.Generator().manual_seed(3)
    start = optimiser.from_prompts(["a portrait"], [3])
    best = min((backbone.initial_latents([generator]) for _ in range(2)), key=lambda x: loss(optimiser, start, x))
    moved = 0
    for _ in range(10):
        tried = math.cos(0.5) * best + math.sin(0.5) * backbone.initial_latents([generator])
        if loss(optimiser, start, tried) < loss(optimiser, start, best):
            best, moved = tried, moved + 1
    assert 0 < moved < 10
    torch.testing.assert_close(found, optimiser.generate(start, best).clamp(0, 1), rtol=1e-3, atol=1e-3)


def loss(optimiser, start, latents):
    return SymmetryLoss()(optimiser.generate(start, latents)).item()


def test_a_rotation_leaves_noise_standard_normal():
    latents, noise = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0)).unbind()
    turned = rotated(latents, noise, 0.4)
    assert turned.std().item() == pytest.approx(1, abs=0.01)
    assert (turned * latents).mean().item() == pytest.approx(math.cos(0.4), abs=0.01)
    torch.testing.assert_close(rotated(latents, noise, 0.0), latents)


def test_candidates_cost_what_the_updates_cost():
    assert candidates_at_equal_cost(3) == 12
