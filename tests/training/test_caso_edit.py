import pytest
import torch
from diffusers import DDIMInverseScheduler

from tests.training.caso_tasks import OfCleanImages, image_batch
from tokenlearn.diffusion import EDICT, Checkpointed, LastK, Reversible
from tokenlearn.errors import UserError
from tokenlearn.guidance import SEGA, ClassifierFreeGuidance, SemanticEdit
from tokenlearn.pipeline import Pipeline, Sampling
from tokenlearn.training import TrainingEdit
from tokenlearn.training.caso_edit import Editor


@pytest.fixture
def latents(backbone):
    return backbone.encode_images(image_batch(3).images)


def editor_of(backbone, settings, steps=10, **sampling):
    return Editor(Pipeline(backbone, sampling=Sampling(steps=steps, **sampling)), settings)


@torch.no_grad()
def test_inversion_takes_each_image_to_its_timestep(backbone, latents):
    editor = editor_of(backbone, TrainingEdit((200, 420), "inversion"))
    assert editor.timesteps == [201, 301, 401]
    noisy = editor.noised(latents, torch.zeros_like(latents), torch.tensor([401, 201, 301]))
    scheduler = DDIMInverseScheduler.from_config(backbone.make_scheduler().config)
    scheduler.set_timesteps(10)
    for row, last in enumerate((401, 201, 301)):
        expected = latents[row : row + 1]
        for timestep in scheduler.timesteps[scheduler.timesteps <= last]:
            output = backbone(expected, timestep, backbone.encode_prompts([""]))
            expected = scheduler.step(output, timestep, expected).prev_sample
        torch.testing.assert_close(noisy[row], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradient", [None, Checkpointed()])
@torch.no_grad()
def test_unedited_is_the_edit_at_scale_0(backbone, latents, gradient):
    timesteps = torch.tensor([401, 201, 401])
    noisy = latents + torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    edits, unguided = (
        editor_of(backbone, TrainingEdit((201, 401), guidance=scale, gradient=gradient)).edits(noisy, timesteps)
        for scale in (5.0, 0.0)
    )
    expected = unguided.edited(["a king", "a queen", "a hat"])
    torch.testing.assert_close(edits.unedited([0, 1, 2]), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(edits.unedited([2, 1]), expected[[2, 1]], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(edits.edited(["a king", "a queen", "a hat"]), expected)


@torch.no_grad()
def test_images_at_one_noise_level_go_through_the_sampler_together(backbone, latents):
    calls = []
    hook = backbone.register_forward_hook(
        lambda backbone, inputs, output: calls.append((len(inputs[0]), int(inputs[1])))
    )
    editor = editor_of(backbone, TrainingEdit((1, 201), guidance=1.0, gradient=Checkpointed()))
    edited = editor.edits(latents, torch.tensor([201, 1, 201])).edited(["a king", "a queen", "a hat"])
    hook.remove()
    assert calls == [(1, 1), (2, 201), (2, 101), (2, 1)]
    for row, timestep, prompt in ((0, 201, "a king"), (1, 1, "a queen"), (2, 201, "a hat")):
        alone = editor.edits(latents[row, None], torch.tensor([timestep])).edited([prompt])
        torch.testing.assert_close(edited[row], alone[0], rtol=1e-4, atol=1e-4)


def test_a_reversible_gradient_takes_the_reversible_solver(backbone, latents):
    timesteps, prompts = torch.tensor([201, 201, 301]), ["a king", "a queen", "a hat"]
    settings = TrainingEdit((201, 301), guidance=2.0, gradient=Reversible())
    edited = editor_of(backbone, settings, solver=EDICT()).edits(latents, timesteps).edited(prompts)
    assert edited.shape == latents.shape
    with pytest.raises(UserError, match=r"model\.edit\.gradient Reversible .*DDIM"):
        editor_of(backbone, settings, solver="DDIM")
    # Other gradients take DDIM, whatever generates the images of validation.
    settings = TrainingEdit((201, 301), guidance=2.0, gradient=LastK(2))
    by_ddim = [
        editor_of(backbone, settings, solver=solver).edits(latents, timesteps).edited(prompts)
        for solver in (None, EDICT(), "Euler")
    ]
    assert torch.equal(by_ddim[0], by_ddim[1])
    assert torch.equal(by_ddim[0], by_ddim[2])


def test_semantic_guidance_must_act_in_the_steps_of_an_edit(backbone):
    def sega(warmup_steps):
        return SEGA([SemanticEdit(concept="hat", warmup_steps=warmup_steps)])

    with pytest.raises(UserError, match=r"warmup_steps 1 .*'hat'.* 1;"):
        TrainingEdit(guidance=sega(1))
    TrainingEdit(guidance=sega(0))
    editor_of(backbone, TrainingEdit((201, 301), guidance=sega(2), gradient=Checkpointed()))
    with pytest.raises(UserError, match=r"warmup_steps 3 .*'hat'.* 3;"):
        editor_of(backbone, TrainingEdit((201, 301), guidance=sega(3), gradient=Checkpointed()))


@pytest.mark.parametrize("timesteps", [(201, 301), 301])
def test_timesteps_are_those_of_noising_and_of_the_sampler(backbone, timesteps):
    expected = [301] if timesteps == 301 else [201, 301]
    assert editor_of(backbone, TrainingEdit(timesteps, gradient=LastK())).timesteps == expected
    assert editor_of(backbone, TrainingEdit(timesteps, "inversion", gradient=LastK())).timesteps == expected
    first, last = expected[0], expected[-1]
    assert editor_of(backbone, TrainingEdit(timesteps)).timesteps == list(range(first, last + 1))


@pytest.mark.parametrize(("rule", "rows"), [(ClassifierFreeGuidance(3.0), [3, 3, 3]), (OfCleanImages(3.0), [6, 6])])
def test_a_rule_that_calls_the_model_itself_edits_in_one_step(backbone, latents, rule, rows):
    calls, timesteps = [], torch.tensor([401, 201, 301])
    edits = editor_of(backbone, TrainingEdit((201, 401), guidance=rule)).edits(latents, timesteps)
    hook = backbone.register_forward_hook(lambda backbone, inputs, output: calls.append(len(inputs[2])))
    for prompts in (["a king"] * 3, ["a king", "a queen", "a hat"]):
        edited = edits.edited(prompts)
    hook.remove()
    assert calls == rows
    for row, prompt in enumerate(prompts):
        empty, prompted = (
            backbone(latents[row, None], timesteps[row], backbone.encode_prompts([text])) for text in ("", prompt)
        )
        noise = empty + 3 * (prompted - empty)
        expected = backbone.process.x0(latents[row, None], noise, timesteps[row])
        torch.testing.assert_close(edited[row], expected[0], rtol=1e-4, atol=1e-4)
