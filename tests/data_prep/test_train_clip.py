import random

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import CLIPModel, CLIPProcessor

from data_prep.portrait_arrays import PORTRAIT_LABELS, PortraitArrays, index_loader
from data_prep.train_clip import (
    ClipTraining,
    absence_prompt,
    contrastive_loss,
    prompted_accuracy,
    prompted_loss,
    save_clip,
    training_text,
)
from data_prep.training import train
from tests.tiny import tiny_tokenizer
from tokenlearn.data.portraits import ATTRIBUTES, attribute_prompt
from tokenlearn.models.clip import ClipModel

PORTRAITS = 8


@pytest.fixture(scope="module")
def arrays():
    generator = torch.Generator().manual_seed(0)
    shape = (PORTRAITS, len(PORTRAIT_LABELS))
    return PortraitArrays(
        images=np.random.default_rng(0).integers(0, 256, (PORTRAITS, 64, 64, 3), dtype=np.uint8),
        labels=torch.rand(shape, generator=generator) < 0.5,
        labels_known=torch.rand(shape, generator=generator) < 0.8,
        personas=torch.zeros(PORTRAITS, dtype=torch.int64),
        captions=[
            f"a photo of a {noun}" for noun in ("king", "queen", "man", "woman", "chef", "clown", "hat", "face")
        ],
    )


def test_contrastive_loss_of_different_texts_is_that_of_clip():
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    log_diagonal = torch.stack([logits.log_softmax(0).diag(), logits.log_softmax(1).diag()])
    torch.testing.assert_close(contrastive_loss(logits, torch.arange(4)[:, None]), -log_diagonal.mean())


def test_contrastive_loss_does_not_tell_pictures_of_the_same_text_apart():
    ids = torch.tensor([[1, 2], [1, 3], [1, 2]])
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    swapped = logits[[2, 1, 0]]
    torch.testing.assert_close(contrastive_loss(logits, ids), contrastive_loss(swapped, ids))
    best = torch.tensor([[50.0, 0, 50.0], [0, 50.0, 0], [50.0, 0, 50.0]])
    torch.testing.assert_close(contrastive_loss(best, ids), torch.tensor(2 / 3 * np.log(2)).float())


def test_training_texts_are_captions_with_what_is_missing():
    rng = random.Random(0)
    shown = [name in ("female", "hat") for name in ATTRIBUTES]
    known = [name != "bangs" for name in ATTRIBUTES]
    texts = {training_text(["a woman with a hat", "a hat"], shown, known, rng) for _ in range(500)}
    assert {"a hat", "a woman with a hat", "a hat without makeup and glasses"} <= texts
    missing = {thing for text in texts for thing in text.partition(" without ")[2].split(" and ")}
    assert missing == {"", "glasses", "makeup", "gray hair", "a bald head"}


def test_absences_in_the_captions_own_words_or_with_without():
    assert absence_prompt("curls") == "a portrait of a person with straight hair"
    assert absence_prompt("hat") == "a portrait of a person without a hat"


def test_prompted_loss_compares_the_two_prompts_of_what_is_known():
    prompts = torch.eye(4)  # two attributes, then their absence
    features = torch.tensor([[0.6, 0.0, 0.2, 0.0], [0.0, 0.3, 0.0, 0.5]])
    shown = torch.tensor([[True, True], [True, False]])
    known = torch.tensor([[True, False], [False, True]])
    expected = torch.tensor([4.0, 2.0])  # logits of what is: 10 times 0.6 - 0.2, and 10 times 0.5 - 0.3
    loss = prompted_loss(features, prompts, torch.tensor(10.0), shown, known)
    torch.testing.assert_close(loss, -functional.logsigmoid(expected).mean())


def test_prompted_loss_of_what_is_likely_is_lowest_at_its_logit():
    prompts, everything = torch.eye(2), torch.ones(1, 1, dtype=torch.bool)
    likely = torch.tensor([[0.75]])
    lowest = torch.tensor(3.0).log() / 10
    features = [torch.tensor([[lowest + offset, 0.0]]) for offset in (-0.05, 0.0, 0.05)]
    low, best, high = (prompted_loss(own, prompts, torch.tensor(10.0), likely, everything) for own in features)
    assert best < low
    assert best < high
    torch.testing.assert_close(best, torch.distributions.Bernoulli(0.75).entropy())


def test_a_trained_clip_is_saved_as_transformers_loads_it(arrays, tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    captions, ratings = [[text] for text in arrays.captions], torch.arange(PORTRAITS) + 1.0
    module = ClipTraining(arrays, captions, ratings, [], tokenizer, 32, 2, 1e-3, seed=0)
    before = {name: tensor.clone() for name, tensor in module.named_parameters()}
    train(module, index_loader(PORTRAITS, 4), tmp_path / "run", ema_decay=None)
    assert all(not torch.equal(before[name], tensor) for name, tensor in module.named_parameters())
    save_clip(module.model.eval(), tokenizer, tmp_path / "clip")

    model = CLIPModel.from_pretrained(tmp_path / "clip")
    assert model.dtype == torch.float32
    processor = CLIPProcessor.from_pretrained(tmp_path / "clip")
    inputs = processor(text=["a photo of a king"], images=[arrays.images[0]], return_tensors="pt")
    clip = ClipModel(str(tmp_path / "clip"))
    with torch.no_grad():
        output = model(**inputs)
    torch.testing.assert_close(clip.image_features(arrays.pixels([0])), output.image_embeds, atol=1e-4, rtol=0)
    torch.testing.assert_close(clip.text_features(["a photo of a king"]), output.text_embeds)


def test_prompted_accuracy_counts_known_labels_alone(arrays):
    class Oracle:
        """Has the labels themselves as image features."""

        def image_features(self, images):
            return arrays.labels.float()[: len(images)] - 0.5

        def text_features(self, prompts):
            rows = torch.zeros(2, len(PORTRAIT_LABELS))
            index = [attribute_prompt(name).replace("portrait", "face") for name in ATTRIBUTES].index(prompts[0])
            assert prompts[1] == absence_prompt(ATTRIBUTES[index]).replace("portrait", "face")
            rows[0, index], rows[1, index] = 1, -1
            return rows

    accuracy = prompted_accuracy(Oracle(), arrays, "a face of")
    assert accuracy == dict.fromkeys(ATTRIBUTES, 1.0)
    wrong = PortraitArrays(**{**vars(arrays), "labels": arrays.labels ^ ~arrays.labels_known})
    Oracle.image_features = lambda self, images: arrays.labels.float() - 0.5
    assert prompted_accuracy(Oracle(), wrong, "a face of") == accuracy
    wrong.labels = ~arrays.labels
    assert prompted_accuracy(Oracle(), wrong, "a face of") == dict.fromkeys(ATTRIBUTES, 0.0)
