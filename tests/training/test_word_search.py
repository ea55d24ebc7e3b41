import pytest
import torch

from tests.training.runs import fit
from tokenlearn.data import PromptDataModule
from tokenlearn.diffusion import LastK
from tokenlearn.errors import UserError
from tokenlearn.objectives import ClassifierLoss, Objective
from tokenlearn.pipeline import Pipeline, Sampling
from tokenlearn.tokens import TokenBank, vectors_from_words, whole_words
from tokenlearn.tokens.settings import TokenSettings
from tokenlearn.training import ClassTokens, WordSearch, find_words, word_search
from tokenlearn.training.word_search import promising_words

CLASSES = ["wizard", "pirate"]


@pytest.fixture
def objective(tiny_models):
    return ClassifierLoss(str(tiny_models / "guide"))


@pytest.fixture
def pipeline(backbone):
    tokens = TokenBank({"<wizard>": 1, "<pirate>": 1}, backbone.embedding_widths)
    return Pipeline(backbone, tokens=tokens, sampling=Sampling(steps=4, guidance=3.0))


def log_probabilities(objective, images, name):
    return objective.classifier(images).log_softmax(dim=1)[:, objective.classifier.label_index(name)]


def test_the_search_finds_the_words_that_trying_them_all_finds(pipeline, objective, monkeypatch):
    words = ["man", "king", "hat", "glasses", "night"]
    monkeypatch.setattr(word_search, "whole_words", lambda tokenizer: words)
    monkeypatch.setattr(word_search, "_SHORTLIST", len(words))
    found = find_words(
        pipeline, objective, CLASSES, "a photo of a {}", search=WordSearch(steps=2), gradient=LastK(2), progress=False
    )
    seeds = list(range(len(words)))
    for name in CLASSES:
        with torch.no_grad():
            scores = [
                log_probabilities(
                    objective, pipeline.generate([f"a photo of a {word} {name}"] * len(seeds), seeds, steps=2), name
                )
                .mean()
                .item()
                for word in words
            ]
        assert scores[words.index(found[name])] == pytest.approx(max(scores), abs=1e-5)


def test_a_large_vocabulary_is_narrowed_down_along_the_gradient(pipeline, objective):
    backbone, bank = pipeline.backbone, pipeline.tokens
    words = whole_words(backbone.tokenizers[0])
    promising = promising_words(pipeline, objective, CLASSES, "a photo of a {}", words, 4, gradient=LastK(2))
    assert len(promising) <= 4 < len(words)

    def vector(word):
        return vectors_from_words(word, backbone.tokenizers[0], backbone.text_encoders[0], 1)

    bank.set("<wizard>", [vector("a")])
    images = pipeline.generate(["a photo of a <wizard>"] * 4, list(range(4)), gradient=LastK(2))
    score = log_probabilities(objective, images, "wizard").mean()
    gradient = torch.autograd.grad(score, bank.vectors[0])[0][0]
    scores = {word: float(vector(word)[0] @ gradient) for word in words}
    assert set(sorted(words, key=scores.get)[-2:]) <= set(promising)


class Brightness(Objective):
    """Wizards should be dark, pirates bright."""

    uses_targets = True

    def loss(self, images, targets=None):
        signs = torch.tensor([{"wizard": 1.0, "pirate": -1.0}[target] for target in targets])
        return signs * images.mean(dim=(1, 2, 3))


def test_the_search_takes_any_objective(pipeline):
    found = find_words(
        pipeline, Brightness(), CLASSES, "a {}", search=WordSearch(words=8, steps=2), gradient=LastK(2), progress=False
    )
    with torch.no_grad():
        brightness = [
            pipeline.generate([f"a {found[name]} {name}"] * 4, range(4), steps=2).mean().item() for name in CLASSES
        ]
    assert brightness[0] < brightness[1]


def test_only_a_fresh_fit_searches(backbone, objective, monkeypatch, tmp_path):
    searches = []

    def find(pipeline, objective, classes, template, **settings):
        searches.append((list(classes), template))
        return {"wizard": "king", "pirate": "hat"}

    monkeypatch.setattr("tokenlearn.training.class_tokens.find_words", find)

    def run(max_steps, folder, **options):
        task = ClassTokens(
            backbone,
            CLASSES,
            objective,
            tokens=TokenSettings(initial_words=None),
            sampling=Sampling(steps=2),
            gradient=LastK(1),
        )
        data = PromptDataModule(["a photo of a {}"], batch_size=1, batches_per_epoch=2, validation_images=1)
        fit(task, data, max_steps=max_steps, folder=folder, **options)
        return task

    task = run(2, tmp_path / "run")
    assert searches == [(CLASSES, "a photo of a {}")]
    assert task.started_from == {"wizard": "king", "pirate": "hat"}
    resumed = run(4, tmp_path / "rest", ckpt_path=str(tmp_path / "run" / "last.ckpt"))
    assert len(searches) == 1
    assert resumed.started_from == {"wizard": "king", "pirate": "hat"}


def test_batches_bound_the_images_at_once(pipeline, objective):
    """Of both the preselection, whose gradients are added up, and the trials."""
    sizes = []
    hook = pipeline.backbone.vae.decoder.register_forward_hook(lambda _, inputs, output: sizes.append(len(inputs[0])))
    found = {}
    for batch_size in (16, 2):
        sizes.clear()
        found[batch_size] = find_words(
            pipeline,
            objective,
            CLASSES,
            "a {}",
            search=WordSearch(words=4, steps=1, batch_size=batch_size),
            gradient=LastK(1),
            progress=False,
        )
        assert max(sizes) == batch_size
    hook.remove()
    assert found[2] == found[16]


@pytest.mark.parametrize("setting", ["words", "steps", "batch_size"])
def test_bad_settings(setting):
    with pytest.raises(UserError, match=rf"search\.{setting}.*0"):
        WordSearch(**{setting: 0})
