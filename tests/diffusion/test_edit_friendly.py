from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from tests.diffusion.networks import (
    DDIM,
    EMPTY,
    SPREAD,
    UNGUIDED,
    FunctionNetwork,
    FunctionRule,
    conditioning,
    gaussian,
    guided,
)
from tokenlearn.diffusion import Inverted, SchedulerSolver, edit_friendly_noise, sample
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance, GuidedModel
from tokenlearn.models import StableDiffusion

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
STEPS = 20
SOLVER = SchedulerSolver(DDIM, STEPS)
PROMPT = conditioning(0.5, -0.5, 1.0)
UNPROMPTED = guided(gaussian, [EMPTY])


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def decibels(found, expected):
    """How far the power of the expected values is above that of the error."""
    return 10 * torch.log10(expected.var() / (found - expected).square().mean())


@pytest.fixture
def latents():
    return SPREAD * torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def sampled(model, solver, noisy, from_timestep=None):
    latents = sample(model, noisy.latents, solver=solver, step_options=noisy.step_options, from_timestep=from_timestep)
    return noisy.finish(latents)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("from_timestep", [None, 401])
def test_noise_is_that_of_the_posterior_of_ddpm(latents, prediction_type, from_timestep):
    """Equations 6 and 7 of DDPM, and the noise that each image's generator gives all levels at once."""
    latents = latents.double()

    def model(latents, timestep, conditioning):
        noise = gaussian(latents, timestep, conditioning)
        alpha_squared = DDIM.alphas_cumprod[timestep]
        alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
        return noise if prediction_type == "epsilon" else (noise - sigma * latents) / alpha

    scheduler = DDIMScheduler.from_config(DDIM.config, prediction_type=prediction_type)
    noisy = edit_friendly_noise(
        GuidedModel(FunctionNetwork(model), UNGUIDED, [EMPTY]),
        latents,
        solver=SchedulerSolver(scheduler, STEPS),
        generators=generators(5, 6, 7),
        from_timestep=from_timestep,
    )

    timesteps = list(range(951 if from_timestep is None else from_timestep, 0, -50))
    assert noisy.step_noise.shape == (3, len(timesteps), 4, 2, 2)
    drawn = torch.stack([torch.randn(len(timesteps), 4, 2, 2, generator=item) for item in generators(5, 6, 7)], dim=1)
    bars = DDIM.alphas_cumprod[timesteps].double()
    path = [bar.sqrt() * latents + (1 - bar).sqrt() * noise for bar, noise in zip(bars, drawn, strict=True)]
    torch.testing.assert_close(noisy.latents.double(), path[0], rtol=1e-5, atol=1e-6)
    for index, (timestep, bar) in enumerate(zip(timesteps, bars, strict=True)):
        before = DDIM.alphas_cumprod[max(timestep - 50, 0)].double()
        beta = 1 - bar / before
        clean = (path[index] - (1 - bar).sqrt() * gaussian(path[index], timestep, EMPTY)) / bar.sqrt()
        mean = (before.sqrt() * beta * clean + (bar / before).sqrt() * (1 - before) * path[index]) / (1 - bar)
        deviation = ((1 - before) / (1 - bar) * beta).sqrt()
        expected = ([*path, latents][index + 1] - mean) / deviation
        torch.testing.assert_close(noisy.step_noise[:, index].double(), expected, rtol=1e-3, atol=1e-3)


SCHEDULES = {
    "last step with a deviation": {"set_alpha_to_one": False, "steps_offset": 1},
    "last step to no noise": {"set_alpha_to_one": True, "steps_offset": 1},
    "last step that changes nothing": {"set_alpha_to_one": False, "steps_offset": 0},
    "clipped": {"set_alpha_to_one": True, "steps_offset": 1, "clip_sample": True, "clip_sample_range": 0.5},
    "trailing": {"set_alpha_to_one": False, "timestep_spacing": "trailing"},
    "zero terminal SNR": {
        "set_alpha_to_one": False,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    },
}


@pytest.mark.parametrize("steps", [1, 4, 100])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_same_guidance_leads_back(latents, name, steps):
    scheduler = DDIMScheduler(**SCHEDULE | SCHEDULES[name])
    scheduler.set_timesteps(steps)

    def combine(outputs, step):
        return outputs[0] + step / steps * (outputs[1] - outputs[0])

    def velocity(latents, timestep, conditioning):
        """Of the network whose images are the conditioning's mean, finite at any noise level."""
        bar = scheduler.alphas_cumprod[timestep]
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        mean = conditioning.prompt_embeds.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)
        noise = sigma / (bar * SPREAD**2 + sigma**2) * (latents - alpha * mean)
        return alpha * noise - sigma * (mean + alpha * SPREAD**2 / sigma * noise)

    network = gaussian if scheduler.config.prediction_type == "epsilon" else velocity
    model, solver = guided(network, [EMPTY, PROMPT], FunctionRule(combine)), SchedulerSolver(scheduler, steps)
    for timestep in {None, int(scheduler.timesteps[0]), int(scheduler.timesteps[steps // 2])}:
        noisy = edit_friendly_noise(
            model, latents, solver=solver, generators=generators(1, 2, 3), from_timestep=timestep
        )
        assert decibels(sampled(model, solver, noisy, timestep), latents) >= 120
        # All but the schedules that end without a deviation need nothing but the noise of the steps.
        without = sample(model, noisy.latents, solver=solver, step_options=noisy.step_options, from_timestep=timestep)
        has_deviation = name in ("last step with a deviation", "trailing", "zero terminal SNR")
        assert (decibels(without, latents) >= 120) == has_deviation
        assert noisy.step_noise[:, -1].any() == has_deviation


def test_the_noise_of_the_last_step_is_kept(latents):
    """The authors' code sets it to 0, with which the image comes back without its last details."""
    scheduler = DDIMScheduler(**SCHEDULE | SCHEDULES["last step with a deviation"])
    scheduler.set_timesteps(20)
    solver = SchedulerSolver(scheduler, 20)
    noisy = edit_friendly_noise(UNPROMPTED, latents, solver=solver, generators=generators(1, 2, 3))
    noise = noisy.step_noise.clone()
    noise[:, -1] = 0
    without = replace(noisy, step_noise=noise)
    assert decibels(sampled(UNPROMPTED, solver, noisy), latents) >= 120
    assert 10 < decibels(sampled(UNPROMPTED, solver, without), latents) < 60


def test_the_first_step_from_pure_noise_in_closed_form(latents):
    """Where alpha is 0, a step of DDPM forgets its latents: its mean is alpha_prev x0, its deviation sigma_prev."""
    scheduler = DDIMScheduler(**SCHEDULE | SCHEDULES["zero terminal SNR"])
    noisy = edit_friendly_noise(
        guided(lambda latents, timestep, conditioning: torch.full_like(latents, -0.3), [EMPTY]),
        latents,
        solver=SchedulerSolver(scheduler, 10),
        generators=generators(1, 2, 3),
    )
    drawn = torch.stack([torch.randn(10, 4, 2, 2, generator=item) for item in generators(1, 2, 3)], dim=1)
    assert scheduler.alphas_cumprod[999] == 0
    torch.testing.assert_close(noisy.latents, drawn[0], rtol=0, atol=0)
    bar = scheduler.alphas_cumprod[899].double()
    second = bar.sqrt() * latents.double() + (1 - bar).sqrt() * drawn[1]
    expected = (second - bar.sqrt() * 0.3) / (1 - bar).sqrt()
    torch.testing.assert_close(noisy.step_noise[:, 0].double(), expected, rtol=0, atol=5e-3)


def test_another_guidance_moves_the_image_towards_it(latents):
    noisy = edit_friendly_noise(UNPROMPTED, latents, solver=SOLVER, generators=generators(1, 2, 3), from_timestep=801)
    moved = []
    for scale in (0.0, 0.5, 1.0):
        rule = ClassifierFreeGuidance(scale)
        model = guided(gaussian, rule.conditionings(EMPTY, conditioning(2.0)), rule)
        moved.append((sampled(model, SOLVER, noisy, 801) - latents).mean())
    assert moved[0].abs() < 1e-6
    assert 0.1 < moved[1] < 0.9 * moved[2]


def test_an_image_does_not_depend_on_its_neighbours(latents):
    together = edit_friendly_noise(
        guided(gaussian, [PROMPT]), latents, solver=SOLVER, generators=generators(1, 2, 3), from_timestep=601
    )
    for index in range(3):
        row = slice(index, index + 1)
        alone = edit_friendly_noise(
            guided(gaussian, [PROMPT[row]]),
            latents[row],
            solver=SOLVER,
            generators=generators(index + 1),
            from_timestep=601,
        )
        for part in ("latents", "step_noise", "remainder"):
            torch.testing.assert_close(getattr(alone, part), getattr(together, part)[row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together.step_noise[0], together.step_noise[1], atol=0.1)


def test_rows_are_repeated_with_all_their_parts(latents):
    solver = SchedulerSolver(DDIM, 4)
    noisy = edit_friendly_noise(UNPROMPTED, latents, solver=solver, generators=generators(1, 2, 3))
    twice = noisy.repeat_interleave(2)
    assert len(twice) == 6
    expected = latents.repeat_interleave(2, dim=0)
    assert decibels(sampled(UNPROMPTED, solver, twice), expected) >= 120
    one = edit_friendly_noise(UNPROMPTED, latents[1:2], solver=solver, generators=generators(1)).expand(3)
    assert decibels(sampled(UNPROMPTED, solver, one), latents[1:2].expand(3, -1, -1, -1)) >= 120
    plain = Inverted(latents)
    assert torch.equal(plain.repeat_interleave(2).latents, expected)
    assert plain.step_options(0) == {}
    assert plain.finish(expected) is expected


def test_noise_is_constant_and_the_scheduler_stays_as_it_was(latents):
    prompt = conditioning(0.5, 0.5, 0.5)
    prompt.prompt_embeds.requires_grad_()
    scheduler = DDIMScheduler.from_config(DDIM.config)
    noisy = edit_friendly_noise(
        guided(gaussian, [prompt]), latents, solver=SchedulerSolver(scheduler, 4), generators=generators(1, 2, 3)
    )
    assert not any(part.requires_grad for part in (noisy.latents, noisy.step_noise, noisy.remainder))
    assert scheduler.num_inference_steps is None
    assert "step" not in vars(scheduler)


@torch.no_grad()
def test_a_network_leads_back_under_the_guidance_of_the_source(tiny_models):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    solver, rule = backbone.make_solver("DDIM", STEPS), ClassifierFreeGuidance(3.5)
    empty, source, other = (backbone.encode_prompts([text]) for text in ("", "a photo of a king", "wizard with hat"))
    latents = backbone.initial_latents([1, 2])
    model = GuidedModel(backbone, rule, [empty, source])
    noisy = edit_friendly_noise(model, latents, solver=solver, generators=generators(3, 4), from_timestep=851)
    assert decibels(sampled(model, solver, noisy, 851), latents) >= 60
    edited = sampled(GuidedModel(backbone, rule, [empty, other]), solver, noisy, 851)
    assert decibels(edited, latents) < 40


def test_impossible_arguments_are_refused(latents):
    for timestep, near in ((400, "351 or 401"), (999, "901 or 951")):
        with pytest.raises(UserError, match=f"timestep {timestep} .* 20; .* {near}"):
            edit_friendly_noise(
                UNPROMPTED, latents, solver=SOLVER, generators=generators(1, 2, 3), from_timestep=timestep
            )
    with pytest.raises(ValueError, match="1 generators for 3 latents"):
        edit_friendly_noise(UNPROMPTED, latents, solver=SOLVER, generators=generators(1))
