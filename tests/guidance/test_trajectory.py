"""Trajectories hold what the network saw, and predict what it would make of it."""

import pytest
import torch

from tokenlearn.diffusion import OneStep, sample
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance, GuidedModel, sample_trajectory
from tokenlearn.models import StableDiffusion

STEPS = 5


@pytest.fixture(scope="module")
def backbone(tiny_models):
    return StableDiffusion(str(tiny_models / "pipeline"))


@pytest.fixture
def model(backbone):
    prompts = backbone.encode_prompts(["a man", "a hat"]), backbone.encode_prompts([""])
    rule = ClassifierFreeGuidance(4.0)
    return GuidedModel(backbone, rule, rule.conditionings(prompts[1], prompts[0]))


def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_the_latents_are_those_between_the_steps(backbone, model):
    solver, between = backbone.make_solver("DDIM", STEPS), [noise()]
    sample(model, noise(), solver=solver, callback=lambda index, latents: between.append(latents.clone()))
    trajectory = sample_trajectory(model, noise(), solver=solver)
    assert trajectory.timesteps.tolist() == solver.timesteps
    assert torch.equal(trajectory.latents, torch.stack(between[:-1]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["DDIM", "EulerAncestralDiscrete", "DPMSolverMultistep", "HeunDiscrete"])
def test_a_share_of_the_way_is_its_beginning(backbone, model, name):
    def trajectory(**share):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return sample_trajectory(
            model, noise(), solver=backbone.make_solver(name, STEPS), generators=generators, **share
        )

    whole = trajectory()
    assert whole.total == len(whole.timesteps)
    for share, number in ((0.5, round(0.5 * whole.total)), (0.01, 1)):
        part = trajectory(share=share)
        assert part.total == whole.total
        assert part.timesteps.tolist() == whole.timesteps[:number].tolist()
        assert torch.equal(part.latents, whole.latents[:number])


@torch.no_grad()
@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "HeunDiscrete"])
def test_the_last_prediction_is_the_image_of_any_scheduler(backbone, model, name):
    """From the last noise level all solvers step to the prediction, but for the noise that is left."""
    trajectory = sample_trajectory(model, noise(), solver=backbone.make_solver(name, 50))
    clean = trajectory.predict_clean(model, torch.tensor([len(trajectory.timesteps) - 1] * 2))
    image = sample(model, noise(), solver=backbone.make_solver(name, 50))
    assert (clean - image).norm() < 0.1 * image.norm()


def test_the_prediction_is_the_processes_own_at_each_samples_noise_level(backbone, model):
    trajectory = sample_trajectory(model, noise(), solver=backbone.make_solver("DDIM", STEPS))
    found = trajectory.predict_clean(model, torch.tensor([1, 3]))
    for row, index in enumerate((1, 3)):
        latents, timestep = trajectory.latents[index], trajectory.timesteps[index]
        alpha = backbone.make_scheduler("DDIM", STEPS).alphas_cumprod[timestep]
        empty, prompt = (
            backbone(latents, timestep, conditioning.expand(2) if len(conditioning) == 1 else conditioning)
            for conditioning in model.conditionings
        )
        predicted = empty + 4.0 * (prompt - empty)
        expected = (latents - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
        torch.testing.assert_close(found[row], expected[row], rtol=1e-4, atol=1e-4)


def test_noise_levels_are_of_the_range():
    generator = torch.Generator().manual_seed(0)
    found = OneStep(0.2, 0.7).indices(20, 400, generator)
    assert (int(found.min()), int(found.max())) == (4, 13)
    assert set(OneStep(0.0, 0.01).indices(20, 50, generator).tolist()) == {0}
    assert set(OneStep(0.99, 1.0).indices(20, 50, generator).tolist()) == {19}


@pytest.mark.parametrize(
    ("settings", "names"),
    [((0.5, 0.5), "0.5 and 0.5"), ((-0.1, 0.5), "-0.1"), ((0.5, 1.5), "1.5"), ((0.2, 0.5, 0), "reuse.*0")],
)
def test_bad_settings(settings, names):
    with pytest.raises(UserError, match=names):
        OneStep(*settings)


def test_samplers_refuse_it(backbone, model):
    with pytest.raises(UserError, match=r"OneStep.*class tokens.*LastK"):
        sample(model, noise(), solver=backbone.make_solver("DDIM", STEPS), gradient=OneStep())
