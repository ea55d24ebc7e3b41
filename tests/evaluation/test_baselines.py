import torch

from tokenlearn.diffusion.latent_optimisation import LatentOptimisation
from tokenlearn.evaluation.baselines import best_of, candidates_at_equal_cost
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


def test_candidates_cost_what_the_updates_cost():
    assert candidates_at_equal_cost(3) == 12
