import pytest
import torch
from diffusers import DDIMInverseScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler

from tests.diffusion.networks import DDIM, EMPTY, SPREAD, FunctionRule, conditioning, gaussian, guided
from tokenlearn.diffusion import LastK, SchedulerSolver, Stored, invert, sample
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance

INVERSE = DDIMInverseScheduler.from_config(DDIM.config)
UNPROMPTED = guided(gaussian, [EMPTY])


def inverse(steps):
    return SchedulerSolver(INVERSE, steps)


def ddim(steps):
    return SchedulerSolver(DDIM, steps)


@pytest.fixture
def latents():
    return SPREAD * torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("to_timestep", [None, 401])
def test_equals_the_loop_of_diffusers(latents, to_timestep):
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
    model = guided(gaussian, [EMPTY, prompt], ClassifierFreeGuidance(3.0))
    found = invert(model, latents, solver=inverse(20), to_timestep=to_timestep)
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
        found = invert(UNPROMPTED, latents, solver=inverse(steps), to_timestep=to_timestep)
        errors.append((found - exact).norm() / exact.norm())
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.4 * errors[1]
    assert errors[2] < 0.003


@pytest.mark.parametrize("timestep", [None, 401])
def test_denoising_undoes_inversion_ever_better(latents, timestep):
    errors = []
    for steps in (10, 50, 250):
        noisy = invert(UNPROMPTED, latents, solver=inverse(steps), to_timestep=timestep)
        back = sample(UNPROMPTED, noisy, solver=ddim(steps), from_timestep=timestep)
        errors.append((back - latents).norm() / latents.norm())
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3
    assert errors[2] < 0.01


def test_two_parts_of_sampling_equal_the_whole():
    noise = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    rule = FunctionRule(ClassifierFreeGuidance(2.0))
    model = guided(gaussian, [EMPTY, conditioning(1.0, -1.0)], rule)
    whole = sample(model, noise, solver=ddim(10))
    middle = sample(model, noise, solver=ddim(10), to_timestep=401)
    end = sample(model, middle, solver=ddim(10), from_timestep=401)
    assert torch.equal(end, whole)
    assert model.rule.steps == [*range(10), *range(5), *range(5)]


def test_gradient_of_a_part_is_counted_from_its_end(latents):
    prompt = conditioning(0.5, 0.5, 0.5)
    prompt.prompt_embeds.requires_grad_()
    gradients = []
    for gradient in (Stored(), LastK(5, checkpointing=False), LastK(2, checkpointing=False)):
        edited = sample(guided(gaussian, [prompt]), latents, solver=ddim(10), gradient=gradient, from_timestep=401)
        gradients.append(torch.autograd.grad(edited.sum(), prompt.prompt_embeds)[0])
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])


def test_inverted_latents_are_constants_unless_asked(latents):
    prompt = conditioning(0.5, 0.5, 0.5)
    prompt.prompt_embeds.requires_grad_()
    model = guided(gaussian, [prompt])
    assert not invert(model, latents, solver=inverse(5)).requires_grad
    assert invert(model, latents, solver=inverse(5), gradient=LastK(1)).requires_grad


def test_impossible_timesteps_are_refused(latents):
    with pytest.raises(UserError, match=r"timestep 400 .* 20; .* 351 or 401"):
        invert(UNPROMPTED, latents, solver=inverse(20), to_timestep=400)
    with pytest.raises(UserError, match=r"timestep 430 .* 401 or 451"):
        sample(UNPROMPTED, latents, solver=ddim(20), from_timestep=430)
    with pytest.raises(UserError, match="timestep 401 to 501"):
        sample(UNPROMPTED, latents, solver=ddim(20), from_timestep=401, to_timestep=501)
    with pytest.raises(ValueError, match="make_inverse_solver"):
        invert(UNPROMPTED, latents, solver=ddim(20))


@pytest.mark.parametrize("scheduler_class", [PNDMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_schedulers_that_cannot_start_in_the_middle_are_refused(latents, scheduler_class):
    scheduler = scheduler_class.from_config(DDIM.config, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    timestep = int(scheduler.timesteps[4])
    with pytest.raises(UserError, match=rf"{scheduler_class.__name__} .* {timestep}"):
        sample(UNPROMPTED, latents, solver=SchedulerSolver(scheduler, 10), from_timestep=timestep)
