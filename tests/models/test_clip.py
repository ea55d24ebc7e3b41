import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from tests.tiny import tiny_text_encoder
from tests.tiny_clip import tiny_clip
from tokenlearn.errors import UserError
from tokenlearn.models.clip import ClipModel

PROMPTS = ["a photo of a king", "a smiling woman with glasses and a hat", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder):
    return ClipModel(str(folder))


def waves(height, width):
    """Smooth uint8 images, (2, H, W, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [np.sin(x / (3 + c)) * np.cos(y / (5 + c) + c) for c in range(6)]
    return (
        (127.5 + 120 * np.stack(channels, axis=-1)).astype(np.uint8).reshape(height, width, 2, 3).transpose(2, 0, 1, 3)
    )


@pytest.mark.parametrize(
    ("size", "processing"),
    [
        ((16, 16), {}),
        ((48, 80), {}),
        ((37, 21), {"size": {"shortest_edge": 20}}),
        ((20, 30), {"size": {"height": 16, "width": 16}, "resample": 2}),
        ((20, 30), {"size": {"height": 12, "width": 12}, "do_normalize": False}),
        ((16, 17), {"do_resize": False, "image_mean": [0.1, 0.4, 0.5], "image_std": [0.3, 0.2, 0.5]}),
        ((30, 16), {"size": {"height": 16, "width": 16}, "do_center_crop": False, "resample": 0}),
    ],
)
def test_preprocessing_equals_the_image_processors(tmp_path, size, processing):
    clip = ClipModel(str(tiny_clip(tmp_path, **processing)))
    arrays = waves(*size)
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    expected = processor([Image.fromarray(array) for array in arrays], return_tensors="pt").pixel_values
    inputs = clip.preprocess(torch.from_numpy(arrays.copy()).permute(0, 3, 1, 2) / 255)
    assert inputs.shape == (2, 3, 16, 16)
    torch.testing.assert_close(inputs, expected, rtol=0, atol=1.5 / 255 / 0.2)  # theirs are rounded to 8 bits


def test_features_are_those_of_transformers_made_unit(folder, clip):
    theirs = CLIPModel.from_pretrained(folder).float().eval()
    assert {parameter.dtype for parameter in clip.parameters()} == {torch.float32}
    images = torch.rand(3, 3, 16, 16)
    tokens = CLIPTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**tokens, pixel_values=clip.preprocess(images))
    torch.testing.assert_close(clip.image_features(images), expected.image_embeds)
    torch.testing.assert_close(clip.text_features(PROMPTS), expected.text_embeds)
    assert clip.image_features(images).shape == (3, clip.feature_dim)


def test_a_text_has_the_same_features_in_any_batch(clip):
    together = clip.text_features(PROMPTS)
    separate = torch.cat([clip.text_features([prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(together, separate)
    assert (together[0] - together[1]).norm() > 1e-3


def test_long_texts_are_cut(clip):
    assert clip.max_prompt_length == 24
    words = " ".join(["king"] * 22)
    torch.testing.assert_close(clip.text_features([words + " queen queen"]), clip.text_features([words]))


def test_stays_frozen_and_differentiable_inside_of_a_parent_that_trains(clip):
    nn.ModuleList([clip]).train()
    assert not any(module.training for module in clip.modules())
    images = torch.rand(2, 3, 24, 24, requires_grad=True)
    (clip.image_features(images) @ clip.text_features(PROMPTS[:1]).T).sum().backward()
    assert images.grad is not None
    assert (images.grad != 0).any(dim=1).all()
    assert all(parameter.grad is None for parameter in clip.parameters())


@pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json", "vocab.json", "model.safetensors"])
def test_half_downloaded_folder_names_the_missing_file(tmp_path, missing):
    (tiny_clip(tmp_path) / missing).unlink()
    with pytest.raises(UserError, match=f"'{missing}'"):
        ClipModel(str(tmp_path))


def test_unreadable_folders_are_one_line(tmp_path):
    weights = tiny_clip(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=re.escape(str(tmp_path))) as caught:
        ClipModel(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_text_encoder_is_not_a_clip(tmp_path):
    tiny_clip(tmp_path)
    tiny_text_encoder(600).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        ClipModel(str(tmp_path))


def test_unknown_names_are_one_line():
    with pytest.raises(UserError, match=r"'\./clip'"):
        ClipModel("./clip")
    with pytest.raises(UserError, match=r"'nobody/clip'.*hub") as caught:
        ClipModel("nobody/clip")
    assert "\n" not in str(caught.value)
