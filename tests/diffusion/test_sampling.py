import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline

from tests.diffusion.networks import EMPTY, UNGUIDED, FunctionNetwork, Recorder, constant
from tests.tiny import tiny_pipeline
from tokenlearn.diffusion import Checkpointed, Detached, FlowProcess, LastK, SchedulerSolver, Stored, sample
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance, GuidedModel
from tokenlearn.models import StableDiffusion

STEPS = 5
SEEDS = [11, 12]
PROMPTS = ["a photo of a king", "wizard with hat"]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folder(request, tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def backbone(folder):
    return StableDiffusion(str(folder))


@pytest.fixture
def conditionings(backbone):
    """Unconditional rows as constants and conditional rows as leaves, as token learning has them."""
    with torch.no_grad():
        unconditional, conditional = backbone.encode_prompts([""]), backbone.encode_prompts(PROMPTS)
    conditional.prompt_embeds.requires_grad_()
    return [unconditional, conditional]


def guided(network, conditionings, scale=4.0):
    return GuidedModel(network, ClassifierFreeGuidance(scale), conditionings)


def solver(backbone, name=None, steps=STEPS):
    return backbone.make_solver(name, steps)


@pytest.mark.parametrize("name", ["DDIM", "DPMSolverMultistep", "PNDM", "Euler", "EulerAncestral"])
def test_equals_the_diffusers_pipeline(folder, backbone, name):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = backbone.make_scheduler(name)
    expected = pipeline(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
    ).images
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    with torch.no_grad():
        latents = sample(
            guided(backbone, [backbone.encode_prompts([""]), backbone.encode_prompts(PROMPTS)]),
            backbone.initial_latents(generators),
            solver=solver(backbone, name),
            generators=generators,
        )
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def reference_gradient(backbone, name, latents, conditionings, scale, differentiated):
    """A plain loop with everything in the graph, cut before the last steps."""
    unconditional, conditional = conditionings
    scheduler = backbone.make_scheduler(name)
    scheduler.set_timesteps(STEPS)
    latents = latents * scheduler.init_noise_sigma
    for index, timestep in enumerate(scheduler.timesteps):
        constant = index < len(scheduler.timesteps) - differentiated
        if constant:
            latents = latents.detach()
        inputs = scheduler.scale_model_input(latents, timestep)
        empty = backbone(inputs, timestep, unconditional.expand(len(latents)))
        prompted = backbone(inputs, timestep, conditional)
        output = empty + scale * (prompted - empty)
        # Multi-step schedulers keep outputs, so those of the constant steps are cut as well as the latents.
        output = output.detach() if constant else output
        latents = scheduler.step(output, timestep, latents).prev_sample
        latents = latents.detach() if constant else latents
    return latents


@pytest.mark.parametrize("gradient", [LastK(1), LastK(2, checkpointing=False), LastK(2), Stored(), Checkpointed()])
@pytest.mark.parametrize("name", ["DDIM", "DPMSolverMultistep", "PNDM"])
def test_gradient_equals_plain_autograd(backbone, conditionings, name, gradient):
    noise = backbone.initial_latents(SEEDS)
    weights = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))
    leaf = conditionings[1].prompt_embeds

    reference = reference_gradient(backbone, name, noise, conditionings, 4.0, gradient.num_steps(100))
    (expected,) = torch.autograd.grad((reference * weights).sum(), leaf)
    latents = sample(guided(backbone, conditionings), noise, solver=solver(backbone, name), gradient=gradient)
    (found,) = torch.autograd.grad((latents * weights).sum(), leaf)
    torch.testing.assert_close(latents, reference, rtol=1e-4, atol=1e-5)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_detached_inputs_leave_each_steps_own_gradient(backbone, conditionings):
    noise = backbone.initial_latents(SEEDS)
    leaf = conditionings[1].prompt_embeds
    scheduler = backbone.make_scheduler("DDIM")
    scheduler.set_timesteps(STEPS)
    latents = noise
    for timestep in scheduler.timesteps:
        unconditional, conditional = (
            backbone(latents.detach(), timestep, item.expand(len(SEEDS))) for item in conditionings
        )
        output = unconditional + 4.0 * (conditional - unconditional)
        latents = scheduler.step(output, timestep, latents).prev_sample
    (expected,) = torch.autograd.grad(latents.square().sum(), leaf)

    model = Recorder(backbone)
    found = sample(
        guided(model, conditionings), noise, solver=solver(backbone, "DDIM"), gradient=Detached(checkpointing=False)
    )
    assert model.calls == [(2, False), (2, True)] * STEPS
    (gradient,) = torch.autograd.grad(found.square().sum(), leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_full_chain_reaches_the_initial_latents(backbone, conditionings):
    noise = backbone.initial_latents(SEEDS).requires_grad_()
    constants = [constant(item) for item in conditionings]
    reference = reference_gradient(backbone, "DDIM", noise, constants, 4.0, STEPS)
    (expected,) = torch.autograd.grad(reference.square().sum(), noise)
    model = Recorder(backbone)
    latents = sample(guided(model, constants), noise, solver=solver(backbone), gradient=Checkpointed())
    assert model.calls == [(4, False)] * STEPS  # computed again where the gradient is wanted
    (gradient,) = torch.autograd.grad(latents.square().sum(), noise)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("gradient", "forward", "recomputed"),
    [
        (LastK(1), [(4, False)] * 4 + [(2, False), (2, True)], []),
        (LastK(2), [(4, False)] * 3 + [(2, False), (2, False), (4, False)], [(4, True), (2, True)]),
        (Checkpointed(), [(2, False), (2, False)] + [(4, False)] * 4, [(4, True)] * 4 + [(2, True)]),
        (None, [(4, False)] * 5, None),
    ],
)
def test_evaluates_with_gradient_only_what_can_have_one(backbone, conditionings, gradient, forward, recomputed):
    model = Recorder(backbone)
    latents = sample(
        guided(model, conditionings), backbone.initial_latents(SEEDS), solver=solver(backbone), gradient=gradient
    )
    assert model.calls == forward
    assert latents.requires_grad == (recomputed is not None)
    if recomputed is not None:
        model.calls.clear()
        latents.sum().backward()
        assert model.calls == recomputed


def test_gradient_steps_count_the_timesteps_of_the_scheduler(backbone, conditionings):
    model = Recorder(backbone)
    noise = backbone.initial_latents(SEEDS)
    sample(guided(model, conditionings), noise, solver=solver(backbone, "PNDM"), gradient=LastK(1))
    assert model.calls == [(4, False)] * STEPS + [(2, False), (2, True)]  # one timestep more than steps


def test_nothing_has_a_gradient_when_no_input_or_the_caller_wants_none(backbone, conditionings):
    noise = backbone.initial_latents(SEEDS)
    constants = [constant(item) for item in conditionings]
    outputs = []
    for items, enabled in ((constants, True), (conditionings, False)):
        model = Recorder(backbone)
        with torch.set_grad_enabled(enabled):
            latents = sample(guided(model, items), noise, solver=solver(backbone), gradient=Checkpointed())
        assert model.calls == [(4, False)] * STEPS
        assert not latents.requires_grad
        outputs.append(latents)
    assert torch.equal(*outputs)


def test_batch_equals_samples_one_by_one(backbone, conditionings):
    unconditional, conditional = (constant(item) for item in conditionings)
    ddim = solver(backbone, steps=3)
    together = sample(guided(backbone, [unconditional, conditional]), backbone.initial_latents(SEEDS), solver=ddim)
    for index, seed in enumerate(SEEDS):
        rows = [unconditional, conditional[index : index + 1]]
        alone = sample(guided(backbone, rows), backbone.initial_latents([seed]), solver=ddim)
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_scheduler_of_the_caller_keeps_no_history(backbone, conditionings):
    multistep = solver(backbone, "DPMSolverMultistep")
    model, noise = guided(backbone, conditionings, 2.0), backbone.initial_latents(SEEDS)
    first = sample(model, noise, solver=multistep)
    assert multistep.scheduler.model_outputs == [None] * len(multistep.scheduler.model_outputs)
    assert torch.equal(first, sample(model, noise, solver=multistep))


def test_callback_sees_the_latents_after_each_step(backbone, conditionings):
    seen = []
    latents = sample(
        guided(backbone, conditionings),
        backbone.initial_latents(SEEDS),
        solver=solver(backbone),
        gradient=LastK(1),
        callback=lambda index, value: seen.append((index, value)),
    )
    assert [index for index, _ in seen] == list(range(STEPS))
    assert [value.requires_grad for _, value in seen] == [False] * (STEPS - 1) + [True]
    assert seen[-1][1] is latents


def test_a_number_of_rows_that_does_not_fit_is_refused(backbone, conditionings):
    noise = backbone.initial_latents([1, 2, 3])
    with pytest.raises(ValueError, match="2 rows for 3 latents"):
        sample(guided(backbone, conditionings), noise, solver=solver(backbone))


@pytest.mark.parametrize("gradient", [LastK, Detached])
def test_a_gradient_through_no_step_is_refused(gradient):
    with pytest.raises(UserError, match=f"{gradient.__name__}.* 1, got -1"):
        gradient(-1)


def test_a_flow_follows_its_straight_line():
    """Normal images with unit noise: the exact velocity of the flow leads every sample along its path."""
    spread = 0.5

    def velocity(latents, timestep, conditioning):
        s = (timestep / 1000).to(latents)
        variance = (1 - s) ** 2 * spread**2 + s**2
        return latents * (s - (1 - s) * spread**2) / variance  # E[e - x0 | z]

    model = GuidedModel(FunctionNetwork(velocity, FlowProcess()), UNGUIDED, [EMPTY])
    noise = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (20, 80, 320):
        found = sample(model, noise, solver=SchedulerSolver(FlowMatchEulerDiscreteScheduler(), steps))
        errors.append((found - spread * noise).norm() / noise.norm())
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2
    assert errors[2] < 0.01
