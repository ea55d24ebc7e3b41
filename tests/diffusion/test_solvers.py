import pytest
import torch

from tests.tiny import tiny_pipeline
from tokenlearn.diffusion import EDICT, OBELM, Checkpointed, LastK, Leapfrog, Reversible, Stored, invert, sample
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance, GuidedModel
from tokenlearn.models import StableDiffusion

STEPS = 5
GUIDANCE = ClassifierFreeGuidance(3.0)
REVERSIBLE = [EDICT(), Leapfrog(), OBELM()]
SOLVERS = ["DDIM", *REVERSIBLE]


def name_of(solver):
    return solver if isinstance(solver, str) else type(solver).__name__


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


def run(backbone, latents, conditionings, solver, from_timestep=None, to_timestep=None):
    return sample(
        GuidedModel(backbone, GUIDANCE, conditionings),
        latents,
        solver=backbone.make_solver(solver, STEPS),
        gradient=Checkpointed() if solver == "DDIM" else Reversible(),
        from_timestep=from_timestep,
        to_timestep=to_timestep,
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
    sampled = run(backbone, latents, prompt, "DDIM")
    torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad((sampled * directions).sum(), leaves)
    for own, plain in zip(gradients, torch.autograd.grad((expected * directions).sum(), leaves), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())


@pytest.mark.parametrize("solver", SOLVERS, ids=name_of)
def test_gradients_reach_latents_and_conditionings(backbone, prompt, solver):
    """By the difference quotient along the gradient."""
    latents = backbone.initial_latents([1, 2]).requires_grad_()
    leaves = [latents, prompt[1].prompt_embeds]
    gradients = torch.autograd.grad(run(backbone, latents, prompt, solver).square().mean(), leaves)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        with torch.no_grad():
            step = 0.02 * gradient / gradient.norm() * leaf.norm() ** 0.5
            values = []
            for sign in (1, -1):
                leaf += sign * step
                values.append(run(backbone, latents, prompt, solver).square().mean())
                leaf -= sign * step
        quotient = (values[0] - values[1]) / 2
        assert quotient.item() == pytest.approx((gradient * step).sum().item(), rel=0.03)


@torch.no_grad()
@pytest.mark.parametrize("solver", SOLVERS, ids=name_of)
def test_parts_make_the_whole(backbone, prompt, solver):
    latents = backbone.initial_latents([1, 2])
    whole = run(backbone, latents, prompt, solver)
    middle = run(backbone, latents, prompt, solver, to_timestep=401)
    end = run(backbone, middle, prompt, solver, from_timestep=401)
    if solver == "DDIM":
        torch.testing.assert_close(end, whole, rtol=1e-4, atol=1e-5)
        by_hand = ddim(backbone, latents, prompt, torch.tensor([801, 601]))
        torch.testing.assert_close(middle, by_hand, rtol=1e-4, atol=1e-5)
    else:  # what the solver carries beside the latents is lost in the middle
        assert (end - whole).norm() < 0.3 * whole.norm()
    # All solvers follow one equation, so they agree better than with what they start from.
    expected = ddim(backbone, latents, prompt, torch.tensor([801, 601, 401, 201, 1]))
    assert (whole - expected).norm() < 0.5 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("to_timestep", [None, 401])
@pytest.mark.parametrize("solver", REVERSIBLE, ids=name_of)
def test_inversion_is_exact(backbone, prompt, solver, to_timestep):
    clean = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    model, bound = GuidedModel(backbone, GUIDANCE, prompt), backbone.make_solver(solver, STEPS)
    pairs = invert(model, clean, solver=bound, to_timestep=to_timestep)
    assert pairs.shape == (2, 2, 4, 8, 12)
    assert not torch.allclose(pairs[:, 0], clean, atol=0.1)
    again = run(backbone, pairs, prompt, solver, from_timestep=to_timestep)
    torch.testing.assert_close(again, clean, rtol=0, atol=2e-3)


def test_what_cannot_be_done(backbone, prompt, tmp_path):
    latents = backbone.initial_latents([1, 2])
    model, ddim = GuidedModel(backbone, GUIDANCE, prompt), backbone.make_solver("DDIM", STEPS)
    with pytest.raises(ValueError, match="make_inverse_solver"):
        invert(model, latents, solver=ddim)
    with pytest.raises(ValueError, match=r"\(B, C, h, w\).*\(2, 2, 4, 8, 8\)"):
        run(backbone, torch.zeros(2, 2, 4, 8, 8), prompt, "DDIM")
    with pytest.raises(UserError, match=r"timestep 400 .* 401"):
        run(backbone, latents, prompt, "DDIM", to_timestep=400)
    with pytest.raises(UserError, match=r"timestep 801 .* 601"):
        run(backbone, latents, prompt, "DDIM", to_timestep=801)
    with pytest.raises(UserError, match=r"Reversible .*DDIMScheduler.* Checkpointed"):
        sample(model, latents, solver=ddim, gradient=Reversible())
    for gradient in (LastK(2), Checkpointed()):
        with pytest.raises(UserError, match=f"{type(gradient).__name__} .*EDICT.* Reversible"):
            sample(model, latents, solver=backbone.make_solver(EDICT(), STEPS), gradient=gradient)


@pytest.mark.parametrize("solver", REVERSIBLE, ids=name_of)
def test_reversible_gradient_equals_stored_activations(backbone, prompt, solver):
    latents, bound = backbone.initial_latents([1, 2]), backbone.make_solver(solver, STEPS)
    bound.dtype = torch.float64  # few steps to a last that is short make O-BELM's rounding grow 6e4 times
    found = [
        torch.autograd.grad(
            sample(GuidedModel(backbone, GUIDANCE, prompt), latents, solver=bound, gradient=gradient).square().sum(),
            prompt[1].prompt_embeds,
        )[0]
        for gradient in (Reversible(), Stored())
    ]
    assert (found[0] - found[1]).norm() < 1e-3 * found[1].norm()


def with_spacing(folder, spacing):
    """A tiny pipeline whose scheduler has another spacing of timesteps."""
    settings = tiny_pipeline(folder) / "scheduler" / "scheduler_config.json"
    settings.write_text(settings.read_text().replace('"leading"', f'"{spacing}"'))
    return StableDiffusion(str(folder))


def test_reversible_solvers_need_leading_timesteps(tmp_path):
    with pytest.raises(UserError, match=r"EDICT .*'leading', not 'trailing'.* edit_friendly"):
        with_spacing(tmp_path, "trailing").make_solver(EDICT(), STEPS)


def test_edits_of_evenly_spaced_pipelines_have_leading_timesteps(tmp_path):
    backbone = with_spacing(tmp_path, "linspace")
    leading = [1 + index * (1000 // STEPS) for index in reversed(range(STEPS))]
    assert backbone.make_solver("DDIM", STEPS).timesteps[0] == 999
    assert backbone.make_editing_solver(STEPS).timesteps == leading
    assert backbone.make_inverse_solver(STEPS).timesteps == leading[::-1]
    assert backbone.make_solver(EDICT(), STEPS).timesteps == leading
