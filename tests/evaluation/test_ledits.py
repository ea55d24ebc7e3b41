"""LEDITS++ of diffusers on the bundled model, by few steps."""

import numpy as np
import pytest
import torch

from tests.tiny_if import tiny_if_pipeline
from tokenlearn.data.portraits import portrait
from tokenlearn.errors import UserError
from tokenlearn.evaluation.ledits import LEditsPP, LEditsPPEditor, WordCounter, word_edits
from tokenlearn.models import DeepFloydIF, StableDiffusion

WORDS = {"glasses": "glasses", "female": "a woman", "no female": "a man"}
DIRECTIONS = [("glasses", None), ("female", "no female")]


@pytest.fixture(scope="module")
def backbone():
    return StableDiffusion("checkpoints/portraits")


@pytest.fixture(scope="module")
def images():
    drawn = np.stack([np.asarray(portrait(5, index)[1]) for index in range(2)])
    return torch.from_numpy(drawn).movedim(-1, 1) / 255


def test_an_edit_goes_away_from_a_class_and_towards_its_opposite():
    glasses, female = word_edits(WORDS, DIRECTIONS)
    assert glasses.terms(adding=True) == {"glasses": False}
    assert glasses.terms(adding=False) == {"glasses": True}
    assert female.terms(adding=True) == {"a woman": False}
    assert female.terms(adding=False) == {"a woman": True, "a man": False}


def test_lengths_are_those_of_the_words(backbone):
    tokenizer = WordCounter(backbone.tokenizers[0])
    settings = {"padding": "max_length", "max_length": 48, "return_length": True, "return_tensors": "pt"}
    found = tokenizer(["glasses", "a man with glasses"], **settings)
    assert found.length.tolist() == [3, 6]  # with the marks of start and end
    assert found.input_ids.shape == (2, 48)
    assert tokenizer.model_max_length == backbone.tokenizers[0].model_max_length


@pytest.mark.parametrize("attention_mask", [True, False])
def test_edits_by_hand(backbone, images, attention_mask):
    settings = LEditsPP(words=WORDS, steps=4, skip=0.5, attention_mask=attention_mask)
    editor = LEditsPPEditor(backbone, settings, word_edits(WORDS, DIRECTIONS))
    processors = {name: type(processor) for name, processor in backbone.unet.attn_processors.items()}
    scales = torch.tensor([[[1e-6, 4.0], [1e-6, 4.0]], [[-1e-6, -4.0], [1e-6, 4.0]]])
    edited = editor.edit(images, scales)
    assert edited.shape == (2, 2, 2, 3, 64, 64)
    assert edited.min() >= 0
    assert edited.max() <= 1
    with torch.no_grad():
        returned = backbone.decode_latents(backbone.encode_images(images)).clamp(0, 1)
    # Without strength, an image comes back but for the noise of the last step, which the inversion leaves out.
    weak, strong = edited.unbind(dim=2)
    assert ((weak - returned[:, None]).abs().mean(dim=(2, 3, 4)) < 0.03).all()
    assert ((strong - weak).abs().mean(dim=(2, 3, 4)) > 5e-4).all()
    # An image's edits depend neither on the rest of the batch nor on earlier edits.
    alone = editor.edit(images[1:], scales[1:])
    assert torch.allclose(alone[0], edited[1], atol=1e-4)
    assert {name: type(processor) for name, processor in backbone.unet.attn_processors.items()} == processors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": {}}, r"ledits\.words is empty"),
        ({"steps": 0}, "steps"),
        ({"skip": -0.1}, "skip of at least 0.*-0.1"),
        ({"threshold": 1.0}, "threshold from 0 to below 1.*and 1"),
    ],
)
def test_bad_settings_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        LEditsPP(**({"words": WORDS} | options))


def test_a_class_without_words_and_another_family_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"ledits\.words has no class 'hat', only glasses, female, no female"):
        word_edits(WORDS, [("hat", None)])
    with pytest.raises(UserError, match=r"edits by a StableDiffusion.*DeepFloydIF"):
        LEditsPPEditor(DeepFloydIF(str(tiny_if_pipeline(tmp_path))), LEditsPP(words=WORDS), [])
