import pytest
import torch

from tokenlearn.diffusion.process import x0_from_noise
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierGuidance
from tokenlearn.models import StableDiffusion
from tokenlearn.objectives import SymmetryLoss
from tokenlearn.pipeline import Pipeline, Sampling

SCALE, STRENGTH = 3.0, 30.0


@pytest.fixture(scope="module")
def backbone(tiny_models):
    return StableDiffusion(str(tiny_models / "pipeline"))


def test_one_step_guidance_as_published(backbone):
    latents, timestep = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(334)
    pipeline = Pipeline(backbone)
    king = pipeline.encode(["a king"])
    model = pipeline.guided_model(king, ClassifierGuidance(SymmetryLoss(), STRENGTH, SCALE))
    guided = model.noise(latents, timestep)
    leaf = latents.clone().requires_grad_()
    alpha, sigma = backbone.process.alpha(timestep), backbone.process.sigma(timestep)
    plain = backbone.predict_noise(leaf, timestep, pipeline.unconditional())
    root = (1 - alpha**2).sqrt()  # of beta, in the notation of the paper
    torch.testing.assert_close(root, sigma)
    blended = root * x0_from_noise(leaf, plain, alpha, sigma) + (1 - root) * leaf
    (gradient,) = torch.autograd.grad(SymmetryLoss()(backbone.decode_latents(blended)).sum(), leaf)
    with torch.no_grad():
        usual = plain + SCALE * (backbone.predict_noise(latents, timestep, king) - plain)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(guided, usual + STRENGTH * root * gradient, rtol=1e-4, atol=1e-5)
    assert not guided.requires_grad


@torch.no_grad()
def test_it_lowers_the_objective_and_without_strength_it_is_classifier_free(backbone):
    pipeline = Pipeline(backbone, sampling=Sampling(3, SCALE, "DDIM"))
    plain = pipeline.generate(["a portrait"], [3])
    for strength in (0.0, STRENGTH):
        rule = ClassifierGuidance(SymmetryLoss(), strength, SCALE)
        image = pipeline.generate(["a portrait"], [3], rule=rule)
        assert torch.allclose(image, plain, rtol=1e-3, atol=1e-3) == (strength == 0)
        if strength:
            assert SymmetryLoss()(image) < SymmetryLoss()(plain)


def test_scales_that_are_not_finite():
    with pytest.raises(UserError, match=r"scale .* inf"):
        ClassifierGuidance(SymmetryLoss(), float("inf"))
