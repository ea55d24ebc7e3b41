from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from tokenlearn.data.pixels import unit_range
from tokenlearn.data.portraits import portrait
from tokenlearn.diffusion import EDICT, OBELM, Leapfrog
from tokenlearn.editing import Editing, ImageEditor
from tokenlearn.errors import UserError
from tokenlearn.models import StableDiffusion
from tokenlearn.pipeline import Pipeline

PORTRAITS = Path(__file__).parents[2] / "checkpoints" / "portraits"
STEPS = 20


@pytest.fixture(scope="module")
def portraits():
    """The bundled model, the latents of a portrait and the VAE's image of them."""
    backbone = StableDiffusion(str(PORTRAITS))
    image = unit_range([torch.from_numpy(np.array(portrait(7, 0)[1]))])
    with torch.no_grad():
        latents = backbone.encode_images(image)
        return backbone, latents, backbone.decode_latents(latents).clamp(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("timestep", [951, 101])
@pytest.mark.parametrize("inversion", ["edit_friendly", EDICT(), Leapfrog(), OBELM()], ids=str)
def test_exact_inversion_of_a_portrait_can_be_edited(portraits, inversion, timestep):
    backbone, latents, roundtrip = portraits
    editor = ImageEditor(backbone, Editing(timestep, STEPS, inversion))
    empty, smiling = backbone.encode_prompts([""]), backbone.encode_prompts(["a portrait of a smiling woman"])
    noisy = editor.invert(latents, empty)
    images = editor.denoise_towards(noisy.expand(2), empty, [smiling], [torch.tensor([0.0, 4.0])])
    back, edited = images.split(1)
    assert peak_signal_noise_ratio(back, roundtrip, 1.0) >= 60
    assert peak_signal_noise_ratio(edited, roundtrip, 1.0) < 48


@torch.no_grad()
def test_edit_friendly_inversion_returns_to_the_image_and_ddim_does_not(portraits):
    backbone, latents, roundtrip = portraits
    empty = backbone.encode_prompts([""])
    decibels = {}
    for inversion in ("ddim", "edit_friendly"):
        editor = ImageEditor(backbone, Editing(601, STEPS, inversion))
        back = editor.denoise_towards(editor.invert(latents, empty), empty, [], [])
        decibels[inversion] = float(peak_signal_noise_ratio(back, roundtrip, 1.0))
    assert decibels["ddim"] < 48 < 60 <= decibels["edit_friendly"]


@torch.no_grad()
def test_edits_of_different_words_in_batches_equal_edits_one_by_one(portraits):
    backbone, latents, _ = portraits
    pipeline, empty = Pipeline(backbone), backbone.encode_prompts([""])
    editor = ImageEditor(backbone, Editing(401, 5))
    noisy = editor.invert(latents, empty)
    edits = [{"a beard": 3.0}, {"a hat": 2.0, "a beard": -1.0}, {"a beard": -2.0}, {}]
    options = {"pipeline": pipeline, "source": empty, "template": "a portrait with {}"}
    images = editor.edit(noisy, edits, **options)
    for edit, image in zip(edits, images, strict=True):
        torch.testing.assert_close(editor.edit(noisy, [edit], **options, batch_size=1)[0], image, rtol=0, atol=1e-4)
        words = [backbone.encode_prompts([f"a portrait with {word}"]) for word in edit]
        reference = editor.denoise_towards(noisy, empty, words, list(edit.values()))[0]
        torch.testing.assert_close(image, reference, rtol=0, atol=1e-4)


def test_steps_up_to_the_timestep_denoise_an_image(tiny_models):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    for inversion in ("ddim", Leapfrog()):
        assert ImageEditor(backbone, Editing(601, 10, inversion)).num_steps == 7


def test_timesteps_between_the_steps_are_refused(tiny_models):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    for inversion in ("ddim", "edit_friendly", EDICT()):
        with pytest.raises(UserError, match=r"model.editing.timestep 600 .*20 steps.* 551 or 601"):
            ImageEditor(backbone, Editing(600, STEPS, inversion), setting="model.editing")


def test_bad_settings():
    with pytest.raises(UserError, match=r"inversion .*ddim.*'edict'"):
        Editing(inversion="edict")
    with pytest.raises(UserError, match=r"steps .* 0"):
        Editing(steps=0)
