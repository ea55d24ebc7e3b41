import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.tiny import tiny_pipeline
from tokenlearn.diffusion import sample
from tokenlearn.guidance import ClassifierFreeGuidance
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


class Recorder:
    """A model that notes how many rows it was asked for and whether for a gradient."""

    def __init__(self, model):
        self.model = model
        self.calls = []

    def __call__(self, latents, timestep, conditioning):
        self.calls.append((len(latents), torch.is_grad_enabled()))
        return self.model(latents, timestep, conditioning)


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
    guidance = ClassifierFreeGuidance(4.0)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    with torch.no_grad():
        latents = sample(
            backbone,
            backbone.make_scheduler(name),
            backbone.initial_latents(generators),
            guidance.conditionings(backbone.encode_prompts([""]), backbone.encode_prompts(PROMPTS)),
            guidance,
            STEPS,
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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("gradient_steps", [1, 2, None])
@pytest.mark.parametrize("name", ["DDIM", "DPMSolverMultistep", "PNDM"])
def test_gradient_equals_plain_autograd(backbone, conditionings, name, gradient_steps, checkpointing):
    noise = backbone.initial_latents(SEEDS)
    weights = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))
    leaf = conditionings[1].prompt_embeds

    reference = reference_gradient(backbone, name, noise, conditionings, 4.0, gradient_steps or 100)
    (expected,) = torch.autograd.grad((reference * weights).sum(), leaf)
    latents = sample(
        backbone,
        backbone.make_scheduler(name),
        noise,
        conditionings,
        ClassifierFreeGuidance(4.0),
        STEPS,
        gradient_steps=gradient_steps,
        checkpointing=checkpointing,
    )
    (gradient,) = torch.autograd.grad((latents * weights).sum(), leaf)
    torch.testing.assert_close(latents, reference, rtol=1e-4, atol=1e-5)
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


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
    guidance = ClassifierFreeGuidance(4.0)
    found = sample(model, scheduler, noise, conditionings, guidance, STEPS, checkpointing=False, detach_inputs=True)
    assert model.calls == [(2, False), (2, True)] * STEPS
    (gradient,) = torch.autograd.grad(found.square().sum(), leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_full_chain_reaches_the_initial_latents(backbone, conditionings):
    noise = backbone.initial_latents(SEEDS).requires_grad_()
    constants = [item.detach() for item in conditionings]
    reference = reference_gradient(backbone, "DDIM", noise, constants, 4.0, STEPS)
    (expected,) = torch.autograd.grad(reference.square().sum(), noise)
    model = Recorder(backbone)
    latents = sample(model, backbone.make_scheduler(), noise, constants, ClassifierFreeGuidance(4.0), STEPS)
    assert model.calls == [(4, False)] * STEPS  # computed again where the gradient is wanted
    (gradient,) = torch.autograd.grad(latents.square().sum(), noise)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("gradient_steps", "forward", "recomputed"),
    [
        (1, [(4, False)] * 4 + [(2, False), (2, True)], []),
        (2, [(4, False)] * 3 + [(2, False), (2, False), (4, False)], [(4, True), (2, True)]),
        (None, [(2, False), (2, False)] + [(4, False)] * 4, [(4, True)] * 4 + [(2, True)]),
        (0, [(4, False)] * 5, None),
    ],
)
def test_evaluates_with_gradient_only_what_can_have_one(backbone, conditionings, gradient_steps, forward, recomputed):
    model = Recorder(backbone)
    latents = sample(
        model,
        backbone.make_scheduler(),
        backbone.initial_latents(SEEDS),
        conditionings,
        ClassifierFreeGuidance(4.0),
        STEPS,
        gradient_steps=gradient_steps,
    )
    assert model.calls == forward
    assert latents.requires_grad == (recomputed is not None)
    if recomputed is not None:
        model.calls.clear()
        latents.sum().backward()
        assert model.calls == recomputed


def test_gradient_steps_count_the_timesteps_of_the_scheduler(backbone, conditionings):
    model = Recorder(backbone)
    scheduler = backbone.make_scheduler("PNDM")
    arguments = [backbone.initial_latents(SEEDS), conditionings, ClassifierFreeGuidance(4.0), STEPS]
    sample(model, scheduler, *arguments, gradient_steps=1)
    assert model.calls == [(4, False)] * STEPS + [(2, False), (2, True)]  # one timestep more than steps


def test_nothing_has_a_gradient_when_no_input_or_the_caller_wants_none(backbone, conditionings):
    noise = backbone.initial_latents(SEEDS)
    constants = [item.detach() for item in conditionings]
    outputs = []
    for items, enabled in ((constants, True), (conditionings, False)):
        model = Recorder(backbone)
        with torch.set_grad_enabled(enabled):
            latents = sample(model, backbone.make_scheduler(), noise, items, ClassifierFreeGuidance(4.0), STEPS)
        assert model.calls == [(4, False)] * STEPS
        assert not latents.requires_grad
        outputs.append(latents)
    assert torch.equal(*outputs)


def test_batch_equals_samples_one_by_one(backbone, conditionings):
    unconditional, conditional = (item.detach() for item in conditionings)
    guidance = ClassifierFreeGuidance(4.0)
    together = sample(
        backbone, backbone.make_scheduler(), backbone.initial_latents(SEEDS), [unconditional, conditional], guidance, 3
    )
    for index, seed in enumerate(SEEDS):
        rows = [unconditional, conditional[index : index + 1]]
        alone = sample(backbone, backbone.make_scheduler(), backbone.initial_latents([seed]), rows, guidance, 3)
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_scheduler_of_the_caller_keeps_no_history(backbone, conditionings):
    scheduler = backbone.make_scheduler("DPMSolverMultistep")
    arguments = [backbone.initial_latents(SEEDS), conditionings, ClassifierFreeGuidance(2.0), STEPS]
    first = sample(backbone, scheduler, *arguments)
    assert scheduler.model_outputs == [None] * len(scheduler.model_outputs)
    assert torch.equal(first, sample(backbone, scheduler, *arguments))


def test_callback_sees_the_latents_after_each_step(backbone, conditionings):
    seen = []
    latents = sample(
        backbone,
        backbone.make_scheduler(),
        backbone.initial_latents(SEEDS),
        conditionings,
        ClassifierFreeGuidance(4.0),
        STEPS,
        gradient_steps=1,
        callback=lambda index, value: seen.append((index, value)),
    )
    assert [index for index, _ in seen] == list(range(STEPS))
    assert [value.requires_grad for _, value in seen] == [False] * (STEPS - 1) + [True]
    assert seen[-1][1] is latents


def test_impossible_arguments_are_refused(backbone, conditionings):
    noise, guidance = backbone.initial_latents([1, 2, 3]), ClassifierFreeGuidance(4.0)
    with pytest.raises(ValueError, match="2 rows for 3 latents"):
        sample(backbone, backbone.make_scheduler(), noise, conditionings, guidance, STEPS)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        sample(backbone, backbone.make_scheduler(), noise[:2], conditionings, guidance, STEPS, gradient_steps=-1)
