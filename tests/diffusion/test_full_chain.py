import pytest
import torch
from diffusers import EulerDiscreteScheduler

from tests.tiny import tiny_pipeline
from tokenlearn.diffusion import invert_full_chain, sample_full_chain
from tokenlearn.diffusion.full_chain import REVERSIBLE
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance
from tokenlearn.models import StableDiffusion

STEPS = 5
GUIDANCE = ClassifierFreeGuidance(3.0)
CHAINS = ["checkpointed", *REVERSIBLE]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def backbone(request, tmp_path_factory):
    return StableDiffusion(str(tiny_pipeline(tmp_path_factory.mktemp(request.param), request.param)))


@pytest.fixture
def prompt(backbone):
    """An empty prompt for all, and one with a gradient for each."""
    with torch.no_grad():
        empty, prompts = backbone.encode_prompts([""]), backbone.encode_prompts(["a king", "a wizard with hat"])
    prompts.prompt_embeds.requires_grad_()
    return GUIDANCE.conditionings(empty, prompts)


def run(backbone, latents, conditionings, chain, from_timestep=None, to_timestep=None):
    scheduler = backbone.make_scheduler("DDIM")
    return sample_full_chain(
        backbone, scheduler, latents, conditionings, GUIDANCE, STEPS, chain, from_timestep, to_timestep
    )


def ddim(backbone, latents, conditionings, timesteps):
    """A plain loop of diffusers' steps, with everything in the graph."""
    scheduler = backbone.make_scheduler("DDIM")
    scheduler.set_timesteps(STEPS)
    empty, prompts = conditionings
    for timestep in timesteps:
        plain = backbone(latents, timestep, empty.expand(2))
        prompted = backbone(latents, timestep, prompts)
        latents = scheduler.step(plain + 3.0 * (prompted - plain), timestep, latents).prev_sample
    return latents


def test_checkpointed_is_ddim_with_its_gradient(backbone, prompt):
    latents = backbone.initial_latents([1, 2]).requires_grad_()
    leaves = [latents, prompt[1].prompt_embeds]
    directions = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    expected = ddim(backbone, latents, prompt, torch.tensor([801, 601, 401, 201, 1]))
    sampled = run(backbone, latents, prompt, "checkpointed")
    torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad((sampled * directions).sum(), leaves)
    for own, plain in zip(gradients, torch.autograd.grad((expected * directions).sum(), leaves), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())


@pytest.mark.parametrize("chain", CHAINS)
def test_gradients_reach_latents_and_conditionings(backbone, prompt, chain):
    """By the difference quotient along the gradient."""
    latents = backbone.initial_latents([1, 2]).requires_grad_()
    leaves = [latents, prompt[1].prompt_embeds]
    gradients = torch.autograd.grad(run(backbone, latents, prompt, chain).square().mean(), leaves)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        with torch.no_grad():
            step = 0.02 * gradient / gradient.norm() * leaf.norm() ** 0.5
            values = []
            for sign in (1, -1):
                leaf += sign * step
                values.append(run(backbone, latents, prompt, chain).square().mean())
                leaf -= sign * step
        quotient = (values[0] - values[1]) / 2
        assert quotient.item() == pytest.approx((gradient * step).sum().item(), rel=0.03)


@torch.no_grad()
@pytest.mark.parametrize("chain", CHAINS)
def test_parts_make_the_whole(backbone, prompt, chain):
    latents = backbone.initial_latents([1, 2])
    whole = run(backbone, latents, prompt, chain)
    middle = run(backbone, latents, prompt, chain, to_timestep=401)
    end = run(backbone, middle, prompt, chain, from_timestep=401)
    if chain == "checkpointed":
        torch.testing.assert_close(end, whole, rtol=1e-4, atol=1e-5)
        by_hand = ddim(backbone, latents, prompt, torch.tensor([801, 601]))
        torch.testing.assert_close(middle, by_hand, rtol=1e-4, atol=1e-5)
    else:  # what the solver carries beside the latents is lost in the middle
        assert (end - whole).norm() < 0.3 * whole.norm()
    # All chains follow one equation, so that they agree better than with what they start from.
    expected = ddim(backbone, latents, prompt, torch.tensor([801, 601, 401, 201, 1]))
    assert (whole - expected).norm() < 0.5 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("to_timestep", [None, 401])
@pytest.mark.parametrize("chain", REVERSIBLE)
def test_inversion_is_exact(backbone, prompt, chain, to_timestep):
    clean = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    scheduler = backbone.make_scheduler("DDIM")
    pairs = invert_full_chain(backbone, scheduler, clean, prompt, GUIDANCE, STEPS, chain, to_timestep)
    assert pairs.shape == (2, 2, 4, 8, 12)
    assert not torch.allclose(pairs[:, 0], clean, atol=0.1)
    again = run(backbone, pairs, prompt, chain, from_timestep=to_timestep)
    torch.testing.assert_close(again, clean, rtol=0, atol=2e-3)


def test_what_cannot_be_done(backbone, prompt):
    latents = backbone.initial_latents([1, 2])
    scheduler = backbone.make_scheduler("DDIM")
    with pytest.raises(UserError, match=r"'checkpointed' cannot be followed backwards exactly; take one of edict"):
        invert_full_chain(backbone, scheduler, latents, prompt, GUIDANCE, STEPS, "checkpointed")
    with pytest.raises(ValueError, match=r"starts from \(B, C, h, w\) latents, got \(2, 2, 4, 8, 8\)"):
        run(backbone, torch.zeros(2, 2, 4, 8, 8), prompt, "checkpointed")
    with pytest.raises(UserError, match="no step of 5 ends at timestep 400; take 401 or"):
        run(backbone, latents, prompt, "checkpointed", to_timestep=400)
    with pytest.raises(UserError, match="no step of 5 ends at timestep 801"):
        run(backbone, latents, prompt, "checkpointed", to_timestep=801)
    spaced = EulerDiscreteScheduler(timestep_spacing="linspace")
    with pytest.raises(UserError, match="timestep_spacing 'leading', not 'linspace'"):
        sample_full_chain(backbone, spaced, latents, prompt, GUIDANCE, STEPS, "edict")
