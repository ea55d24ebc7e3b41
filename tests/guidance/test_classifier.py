import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from tokenlearn.diffusion import DiscreteProcess, SchedulerSolver, sample
from tokenlearn.diffusion.process import convert, x0_from_noise
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierGuidance, GuidedModel
from tokenlearn.losses import Objective
from tokenlearn.models import Conditioning, StableDiffusion
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


ZERO_TERMINAL = DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    timestep_spacing="trailing",
    rescale_betas_zero_snr=True,
    prediction_type="v_prediction",
)


class MeanSquare(Objective):
    def loss(self, images, targets=None):
        return images.square().mean(dim=(1, 2, 3))


class LinearVelocity(nn.Module):
    """A network whose prediction is ``a z + b``, with ``b`` of the conditioning; its images are its latents."""

    def __init__(self, process, slope=0.7):
        super().__init__()
        self.process, self.slope = process, slope

    def forward(self, latents, timesteps, conditioning):
        return self.slope * latents + conditioning.prompt_embeds.reshape(-1, 1, 1, 1)

    def decode_latents(self, latents):
        return latents


def zero_terminal(dtype=torch.float64):
    process = DiscreteProcess(ZERO_TERMINAL.alphas_cumprod, "velocity").to(dtype)
    offsets = [Conditioning(torch.tensor([[[value]]], dtype=dtype)) for value in (0.2, -0.5)]
    return GuidedModel(LinearVelocity(process), ClassifierGuidance(MeanSquare(), STRENGTH, SCALE), offsets)


@pytest.mark.parametrize("timestep", [999, 998, 601])
def test_guided_velocity_in_closed_form(timestep):
    """The velocity gives x0 = alpha z - sigma v; a change of the noise by d is one of v by d / alpha."""
    model = zero_terminal()
    latents = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = (function(torch.tensor(timestep)) for function in (model.process.alpha, model.process.sigma))
    guided = model(latents, torch.tensor(timestep), 0)
    empty, prompted = 0.7 * latents + 0.2, 0.7 * latents - 0.5
    expected = empty + SCALE * (prompted - empty)
    if timestep == 999:
        assert alpha == 0
    else:
        blended = sigma * (alpha * latents - sigma * empty) + (1 - sigma) * latents
        slope = sigma * (alpha - 0.7 * sigma) + 1 - sigma
        change = STRENGTH * sigma * slope * 2 * blended / blended[0].numel()
        expected = expected + change / alpha
        kinds = {"source": "velocity", "target": "noise"}
        noise = convert(expected - change / alpha, latents, alpha, sigma, **kinds) + change
        torch.testing.assert_close(convert(guided, latents, alpha, sigma, **kinds), noise, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(guided, expected, rtol=1e-9, atol=1e-9)


def test_sampling_from_pure_noise_is_finite_and_lowers_the_objective():
    model, latents = zero_terminal(torch.float32), torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    plain = GuidedModel(model.backbone, ClassifierGuidance(MeanSquare(), 0.0, SCALE), model.conditionings)
    guided, unguided = (sample(item, latents, solver=SchedulerSolver(ZERO_TERMINAL, 10)) for item in (model, plain))
    assert guided.isfinite().all()
    assert guided.square().mean() < 0.5 * unguided.square().mean()
