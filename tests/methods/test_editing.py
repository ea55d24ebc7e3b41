from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from tokenlearn.data.images import unit_range
from tokenlearn.data.portraits import portrait
from tokenlearn.errors import UserError
from tokenlearn.methods.editing import PictureEditor
from tokenlearn.models import StableDiffusion

PORTRAITS = Path(__file__).parents[2] / "checkpoints" / "portraits"
STEPS = 20


@pytest.fixture(scope="module")
def portraits():
    """The bundled model, the latents of a drawn portrait and what its VAE makes of them."""
    backbone = StableDiffusion(str(PORTRAITS))
    picture = unit_range([torch.from_numpy(np.array(portrait(7, 0)[1]))])
    with torch.no_grad():
        latents = backbone.encode_images(picture)
        return backbone, latents, backbone.decode_latents(latents).clamp(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("timestep", [951, 101])
@pytest.mark.parametrize("inversion", ["edit_friendly", "edict", "leapfrog", "o_belm"])
def test_exact_inversion_of_a_portrait_can_be_edited(portraits, inversion, timestep):
    backbone, latents, roundtrip = portraits
    editor = PictureEditor(backbone, STEPS, timestep, "timestep", inversion)
    empty, smiling = backbone.encode_prompts([""]), backbone.encode_prompts(["a portrait of a smiling woman"])
    noisy = editor.invert(latents, empty)
    back, edited = editor.denoise(noisy.expand(2), empty, [smiling], [torch.tensor([0.0, 4.0])]).split(1)
    assert peak_signal_noise_ratio(back, roundtrip, 1.0) >= 60
    assert peak_signal_noise_ratio(edited, roundtrip, 1.0) < 40


@torch.no_grad()
def test_edit_friendly_inversion_comes_back_where_ddim_does_not(portraits):
    backbone, latents, roundtrip = portraits
    empty = backbone.encode_prompts([""])
    decibels = {}
    for inversion in ("ddim", "edit_friendly"):
        editor = PictureEditor(backbone, STEPS, 601, "timestep", inversion)
        back = editor.denoise(editor.invert(latents, empty), empty, [], [])
        decibels[inversion] = float(peak_signal_noise_ratio(back, roundtrip, 1.0))
    assert decibels["ddim"] < 40 < 60 <= decibels["edit_friendly"]


def test_timesteps_between_the_steps_are_refused(tiny_models):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    for inversion in ("ddim", "edit_friendly"):
        with pytest.raises(UserError, match=r"model.timestep 600 is not among the 20 steps; take 551 or 601"):
            PictureEditor(backbone, STEPS, 600, "model.timestep", inversion)
