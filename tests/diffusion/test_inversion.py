import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)

from tokenlearn.diffusion import invert, sample
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance
from tokenlearn.models import Conditioning

DDIM = DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
INVERSE = DDIMInverseScheduler.from_config(DDIM.config)
SPREAD = 0.5


def gaussian(latents, timestep, conditioning):
    """The best prediction of noise where images are normal with deviation SPREAD about the conditioning."""
    alpha_squared = DDIM.alphas_cumprod[timestep]
    mean = alpha_squared.sqrt() * conditioning.prompt_embeds.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)
    variance = alpha_squared * SPREAD**2 + 1 - alpha_squared
    return (1 - alpha_squared).sqrt() / variance * (latents - mean)


@pytest.fixture
def latents():
    return SPREAD * torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def conditioning(*means):
    return Conditioning(torch.tensor(means).reshape(-1, 1, 1))


EMPTY = conditioning(0.0)


@pytest.mark.parametrize("to_timestep", [None, 401])
def test_equals_the_loop_of_diffusers(latents, to_timestep):
    guidance = ClassifierFreeGuidance(3.0)
    prompt = conditioning(0.1, 0.2, 0.3)
    scheduler = DDIMInverseScheduler.from_config(DDIM.config)
    scheduler.set_timesteps(20)
    expected = latents
    for timestep in scheduler.timesteps:
        empty = gaussian(expected, timestep, EMPTY)
        output = empty + 3.0 * (gaussian(expected, timestep, prompt) - empty)
        expected = scheduler.step(output, timestep, expected).prev_sample
        if timestep == to_timestep:
            break
    found = invert(
        gaussian, INVERSE, latents, guidance.conditionings(EMPTY, prompt), 20, to_timestep, combine=guidance
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("to_timestep", [None, 401])
def test_inversion_follows_the_exact_flow_ever_closer(latents, to_timestep):
    """The flow of normal images only rescales them, so that each stays as many deviations from the mean."""
    errors = []
    for steps in (50, 125, 500):
        INVERSE.set_timesteps(steps)
        last = INVERSE.timesteps[-1] if to_timestep is None else to_timestep
        deviations = [(DDIM.alphas_cumprod[t] * SPREAD**2 + 1 - DDIM.alphas_cumprod[t]).sqrt() for t in (0, last)]
        exact = latents * deviations[1] / deviations[0]
        errors.append((invert(gaussian, INVERSE, latents, [EMPTY], steps, to_timestep) - exact).norm() / exact.norm())
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.4 * errors[1]
    assert errors[2] < 0.003


@pytest.mark.parametrize("timestep", [None, 401])
def test_denoising_undoes_inversion_ever_better(latents, timestep):
    errors = []
    for steps in (10, 50, 250):
        noisy = invert(gaussian, INVERSE, latents, [EMPTY], steps, timestep)
        back = sample(gaussian, DDIM, noisy, [EMPTY], lambda outputs, _: outputs[0], steps, from_timestep=timestep)
        errors.append((back - latents).norm() / latents.norm())
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3
    assert errors[2] < 0.01


def test_two_parts_of_the_chain_equal_the_whole():
    noise = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    prompt, guidance, steps = conditioning(1.0, -1.0), ClassifierFreeGuidance(2.0), []

    def counted(outputs, step):
        steps.append(step)
        return guidance(outputs, step)

    whole = sample(gaussian, DDIM, noise, [EMPTY, prompt], counted, 10)
    middle = sample(gaussian, DDIM, noise, [EMPTY, prompt], counted, 10, to_timestep=501)
    end = sample(gaussian, DDIM, middle, [EMPTY, prompt], counted, 10, from_timestep=401)
    assert torch.equal(end, whole)
    assert steps == [*range(10), *range(5), *range(5)]


def test_gradient_of_a_part_is_counted_from_its_end(latents):
    prompt = conditioning(0.5, 0.5, 0.5)
    prompt.prompt_embeds.requires_grad_()
    guidance = ClassifierFreeGuidance(1.0)
    gradients = []
    for gradient_steps in (None, 5, 2):
        edited = sample(
            gaussian, DDIM, latents, [prompt], guidance, 10, gradient_steps=gradient_steps, from_timestep=401
        )
        gradients.append(torch.autograd.grad(edited.sum(), prompt.prompt_embeds)[0])
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])


def test_inverted_latents_are_constants_unless_asked(latents):
    prompt = conditioning(0.5, 0.5, 0.5)
    prompt.prompt_embeds.requires_grad_()
    assert not invert(gaussian, INVERSE, latents, [prompt], 5).requires_grad
    assert invert(gaussian, INVERSE, latents, [prompt], 5, gradient_steps=1).requires_grad


def test_impossible_timesteps_are_refused(latents):
    first = [gaussian, DDIM, latents, [EMPTY], lambda outputs, _: outputs[0], 20]
    with pytest.raises(UserError, match="timestep 400 is not one of the scheduler's 20; take 401 or 351"):
        invert(gaussian, INVERSE, latents, [EMPTY], 20, 400)
    with pytest.raises(UserError, match=r"timestep 430 .* take 451 or 401"):
        sample(*first, from_timestep=430)
    with pytest.raises(UserError, match="no step from timestep 401 to 501"):
        sample(*first, from_timestep=401, to_timestep=501)
    with pytest.raises(ValueError, match="make a DDIMInverseScheduler"):
        invert(gaussian, DDIM, latents, [EMPTY], 20)


@pytest.mark.parametrize("scheduler_class", [PNDMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_schedulers_that_cannot_start_in_the_middle_are_refused(latents, scheduler_class):
    scheduler = scheduler_class.from_config(DDIM.config, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    timestep = int(scheduler.timesteps[4])
    with pytest.raises(UserError, match=rf"{scheduler_class.__name__} cannot start at timestep {timestep}"):
        sample(gaussian, scheduler, latents, [EMPTY], lambda outputs, _: outputs[0], 10, from_timestep=timestep)
