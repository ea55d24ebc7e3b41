import pytest
import torch
from diffusers import DDIMScheduler

from tokenlearn.diffusion import Inverted, edit_friendly_noise, sample
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance
from tokenlearn.models import Conditioning, StableDiffusion

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
DDIM = DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, steps_offset=1)
SPREAD = 0.5
STEPS = 20


def gaussian(latents, timestep, conditioning):
    """The best prediction of noise where images are normal with deviation SPREAD about the conditioning."""
    alpha_squared = DDIM.alphas_cumprod[timestep]
    mean = alpha_squared.sqrt() * conditioning.prompt_embeds.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)
    variance = alpha_squared * SPREAD**2 + 1 - alpha_squared
    return (1 - alpha_squared).sqrt() / variance * (latents - mean)


def conditioning(*means):
    return Conditioning(torch.tensor(means).reshape(-1, 1, 1))


EMPTY, PROMPT = conditioning(0.0), conditioning(0.5, -0.5, 1.0)


def first(outputs, step):
    return outputs[0]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def decibels(found, expected):
    """How far the power of the expected values is above that of the error."""
    return 10 * torch.log10(expected.var() / (found - expected).square().mean())


@pytest.fixture
def latents():
    return SPREAD * torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def sampled(model, scheduler, noisy, conditionings, combine, steps, from_timestep=None):
    return noisy.finish(
        sample(
            model,
            scheduler,
            noisy.latents,
            conditionings,
            combine,
            steps,
            step_options=noisy.step_options,
            from_timestep=from_timestep,
        )
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("from_timestep", [None, 401])
def test_noise_is_that_of_the_posterior_of_ddpm(latents, prediction_type, from_timestep):
    """Equations 6 and 7 of DDPM, and the noise that each picture's generator draws for all levels at once."""
    latents = latents.double()

    def model(latents, timestep, conditioning):
        noise = gaussian(latents, timestep, conditioning)
        alpha_squared = DDIM.alphas_cumprod[timestep]
        alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
        return noise if prediction_type == "epsilon" else (noise - sigma * latents) / alpha

    scheduler = DDIMScheduler.from_config(DDIM.config, prediction_type=prediction_type)
    noisy = edit_friendly_noise(
        model, scheduler, latents, [EMPTY], first, STEPS, generators(5, 6, 7), from_timestep=from_timestep
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
}


@pytest.mark.parametrize("steps", [1, 4, 100])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_same_guidance_leads_back(latents, name, steps):
    scheduler = DDIMScheduler(**SCHEDULE | SCHEDULES[name])
    scheduler.set_timesteps(steps)

    def combine(outputs, step):
        return outputs[0] + step / steps * (outputs[1] - outputs[0])

    for timestep in {None, int(scheduler.timesteps[0]), int(scheduler.timesteps[steps // 2])}:
        arguments = [[EMPTY, PROMPT], combine, steps]
        noisy = edit_friendly_noise(gaussian, scheduler, latents, *arguments, generators(1, 2, 3), timestep)
        assert decibels(sampled(gaussian, scheduler, noisy, *arguments, timestep), latents) >= 120
        # All but the schedules that end without a deviation need nothing but the noise of the steps.
        without = sample(
            gaussian,
            scheduler,
            noisy.latents,
            *arguments,
            step_options=noisy.step_options,
            from_timestep=timestep,
        )
        has_deviation = name in ("last step with a deviation", "trailing")
        assert (decibels(without, latents) >= 120) == has_deviation
        assert noisy.step_noise[:, -1].any() == has_deviation


def test_another_guidance_moves_the_picture_towards_it(latents):
    noisy = edit_friendly_noise(gaussian, DDIM, latents, [EMPTY], first, STEPS, generators(1, 2, 3), 801)
    moved = []
    for scale in (0.0, 0.5, 1.0):
        guidance = ClassifierFreeGuidance(scale)
        edited = sampled(gaussian, DDIM, noisy, guidance.conditionings(EMPTY, conditioning(2.0)), guidance, STEPS, 801)
        moved.append((edited - latents).mean())
    assert moved[0].abs() < 1e-6
    assert 0.1 < moved[1] < 0.9 * moved[2]


def test_a_picture_does_not_depend_on_those_beside_it(latents):
    arguments = [first, STEPS]
    together = edit_friendly_noise(gaussian, DDIM, latents, [PROMPT], *arguments, generators(1, 2, 3), 601)
    for index in range(3):
        row = slice(index, index + 1)
        alone = edit_friendly_noise(
            gaussian, DDIM, latents[row], [PROMPT[row]], *arguments, generators(index + 1), 601
        )
        for part in ("latents", "step_noise", "remainder"):
            torch.testing.assert_close(getattr(alone, part), getattr(together, part)[row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together.step_noise[0], together.step_noise[1], atol=0.1)


def test_rows_are_repeated_with_all_their_parts(latents):
    options = [[EMPTY], first, 4]
    noisy = edit_friendly_noise(gaussian, DDIM, latents, *options, generators(1, 2, 3))
    twice = noisy.repeat_interleave(2)
    assert len(twice) == 6
    expected = latents.repeat_interleave(2, dim=0)
    assert decibels(sampled(gaussian, DDIM, twice, *options), expected) >= 120
    one = edit_friendly_noise(gaussian, DDIM, latents[1:2], *options, generators(1)).expand(3)
    assert decibels(sampled(gaussian, DDIM, one, *options), latents[1:2].expand(3, -1, -1, -1)) >= 120
    plain = Inverted(latents)
    assert torch.equal(plain.repeat_interleave(2).latents, expected)
    assert plain.step_options(0) == {}
    assert plain.finish(expected) is expected


def test_noise_is_constant_and_the_scheduler_stays_as_it_was(latents):
    prompt = conditioning(0.5, 0.5, 0.5)
    prompt.prompt_embeds.requires_grad_()
    scheduler = DDIMScheduler.from_config(DDIM.config)
    noisy = edit_friendly_noise(gaussian, scheduler, latents, [prompt], first, 4, generators(1, 2, 3))
    assert not any(part.requires_grad for part in (noisy.latents, noisy.step_noise, noisy.remainder))
    assert scheduler.num_inference_steps is None
    assert "step" not in vars(scheduler)


@torch.no_grad()
def test_a_network_leads_back_under_the_guidance_of_the_source(tiny_models):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    scheduler, guidance = backbone.make_scheduler("DDIM"), ClassifierFreeGuidance(3.5)
    empty, source, other = (backbone.encode_prompts([text]) for text in ("", "a photo of a king", "wizard with hat"))
    latents = backbone.initial_latents([1, 2])
    conditionings = guidance.conditionings(empty, source)
    noisy = edit_friendly_noise(
        backbone, scheduler, latents, conditionings, guidance, STEPS, generators(3, 4), from_timestep=851
    )
    assert decibels(sampled(backbone, scheduler, noisy, conditionings, guidance, STEPS, 851), latents) >= 60
    edited = sampled(
        backbone, scheduler, noisy, guidance.conditionings(empty, other), guidance, STEPS, from_timestep=851
    )
    assert decibels(edited, latents) < 40


def test_impossible_arguments_are_refused(latents):
    arguments = [gaussian, DDIM, latents, [EMPTY], first, STEPS]
    with pytest.raises(UserError, match="timestep 400 is not one of the scheduler's 20; take 401 or 351"):
        edit_friendly_noise(*arguments, generators(1, 2, 3), from_timestep=400)
    with pytest.raises(UserError, match="timestep 999 is not one of the scheduler's 20; take 951 or 901"):
        edit_friendly_noise(*arguments, generators(1, 2, 3), from_timestep=999)
    with pytest.raises(ValueError, match="1 generators for 3 latents"):
        edit_friendly_noise(*arguments, generators(1))
