import json
from typing import get_args

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks import initialisation
from benchmarks.common import parse_config
from tests.tiny import tiny_classifier
from tokenlearn.errors import UserError
from tokenlearn.tokens import ClassInitialiser
from tokenlearn.training import Caso

INITIALISERS = get_args(ClassInitialiser)


@pytest.fixture
def config(tiny_models, tmp_path, monkeypatch):
    """Write a config of labelled images, with changes of the model."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    smiles = [index % 2 == 0 for index in range(16)]
    # Bright ones smile, so that class means are more than rounding.
    pixels = [rng.integers(150 * smile, 150 * smile + 100, (16, 16, 3), dtype=np.uint8) for smile in smiles]
    datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in pixels], "smile": smiles},
        features=datasets.Features({"image": datasets.Image(), "smile": datasets.Value("bool")}),
    ).save_to_disk(tmp_path / "faces")

    def write(initialisation=None, **changes):
        guide = tiny_classifier(tmp_path / "guide", ["smile", "hat"], multi_label=True)
        options = {
            "backbone": {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_models / "pipeline")}},
            "classifier": str(guide),
            "judge": "to be left out",
            "attributes": {"smile": None, "hat": None},
            "initialisation": {"words": 3, "collapse_batches": 1} | (initialisation or {}),
        }
        data = {
            "source": str(tmp_path / "faces"),
            "labels": {"columns": {"smile": "smile"}},
            "batches_per_epoch": 3,
            "held_out": {"test": 0},
            "num_workers": 0,
        }
        settings = {
            "seed_everything": 0,
            "model": {"class_path": "Caso", "init_args": options | changes},
            "data": {"class_path": "ImageDataModule", "init_args": data},
            "trainer": {"accelerator": "cpu", "max_steps": 600, "num_sanity_val_steps": 0},
        }
        path = tmp_path / "caso.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    return write


def measure(config, capsys, **options):
    """Lines of the table, and the results."""
    small = {"attributes": ("smile",), "seeds": (0, 1), "max_steps": 4, "images": 2, "batch_size": 2}
    initialisation.main(fit_config=config, **(small | options))
    lines = capsys.readouterr().out.splitlines()
    return lines, json.loads(lines[-1])


@pytest.fixture
def reached(monkeypatch):
    """Have each initialiser reach 90 % at a step, None for never, and collect what was trained."""

    def pretend(steps):
        runs = []

        def log_accuracy(task):
            step = steps[task.initialisation.kind]
            there = step is not None and task.global_step >= step
            if task.trainer.sanity_checking:
                runs.append((task, task.trainer))
            task.log("val/guided_accuracy", torch.tensor(0.9 if there else 0.89))

        monkeypatch.setattr(Caso, "on_validation_epoch_end", log_accuracy)
        return runs

    return pretend


def test_counts_the_steps_until_the_accuracy(config, capsys, reached):
    runs = reached({"words": 4, "pull_back": 0, "vocabulary": 1, "ridge": None})
    lines, results = measure(config({"kind": "vocabulary"}), capsys, max_steps=7)
    assert results == {
        "default_over_word": 0.5,
        "default": "vocabulary",
        "steps_words": 4,
        "steps_pull_back": 0,
        "steps_vocabulary": 2,  # the first check after step 1
        "steps_ridge": 7,
        "unreached_words": 0,
        "unreached_pull_back": 0,
        "unreached_vocabulary": 0,
        "unreached_ridge": 2,
    }
    rows = {line.split()[1]: line.split()[2:] for line in lines if line.startswith("smile ")}
    assert rows == {
        "words": ["4", "4", "4"],
        "pull_back": ["0", "0", "0"],
        "vocabulary": ["2", "2", "2"],
        "ridge": ["7*", "7*", "7"],
    }
    assert "* not reached in 7 steps, which are counted; checked every 2, default 'vocabulary'" in lines
    # Trainings end there, past the ends of epochs.
    trained = [(task.initialisation.kind, task.seed, trainer.global_step) for task, trainer in runs]
    ends = {"words": 4, "pull_back": 0, "vocabulary": 2, "ridge": 7}
    assert trained == [(name, seed, ends[name]) for name in INITIALISERS for seed in (0, 1)]
    for task, trainer in runs:
        data = trainer.datamodule
        assert ([attribute.name for attribute in task.attributes], task.judge) == (["smile"], None)
        assert (data.seed, data.batch_size, data.held_out.validation) == (task.seed, 2, 2)


def test_medians_are_over_attributes_and_seeds(config, capsys, monkeypatch):
    found = {"smile": {0: 2, 1: 6, 2: 4}, "hat": {0: 8, 1: None, 2: 8}}

    def pretend(settings, changes, seed, *limits):
        (attribute,) = changes["model.init_args.attributes"]
        return 0 if changes["model.init_args.initialisation.kind"] == "ridge" else found[attribute][seed]

    monkeypatch.setattr(initialisation, "steps_to_accuracy", pretend)
    options = {"attributes": ("smile", "hat"), "seeds": (0, 1, 2), "max_steps": 20}
    lines, results = measure(config({"kind": "ridge"}), capsys, **options)
    assert (results["steps_words"], results["steps_ridge"]) == (7, 0)  # of 2, 4, 6, 8, 8, 20
    assert (results["default_over_word"], results["unreached_words"]) == (0, 1)
    assert next(line.split() for line in lines if line.startswith("hat")) == ["hat", "words", "8", "20*", "8", "8"]


@pytest.mark.parametrize(("steps", "word_steps", "expected"), [(3, 4, 0.75), (0, 0, 1.0), (3, 0, None)])
def test_ratio(steps, word_steps, expected):
    assert initialisation.ratio(steps, word_steps) == expected


def test_trains_for_real(config, capsys, monkeypatch):
    checks, stop = [], initialisation.StopAtAccuracy.on_validation_end

    def on_validation_end(callback, trainer, task):
        checks.append((task.initialisation.kind, trainer.global_step, task.bank.vectors[0].detach().clone()))
        stop(callback, trainer, task)

    monkeypatch.setattr(initialisation.StopAtAccuracy, "on_validation_end", on_validation_end)
    _, results = measure(config(), capsys, seeds=(0,), accuracy=1.0, max_steps=2, check_every=1)
    assert results["default"] == parse_config(config())["model.init_args.initialisation.kind"]
    assert {f"steps_{name}" for name in INITIALISERS} < set(results)
    first = {name: vectors for name, step, vectors in checks if step == 0}
    assert set(first) == set(INITIALISERS)
    # Each is checked where it starts, which is not at the word but for one of them.
    assert all(torch.equal(first[name], first["words"]) == (name == "words") for name in INITIALISERS)
    for name in INITIALISERS:
        assert [step for other, step, _ in checks if other == name] == list(range(int(results[f"steps_{name}"]) + 1))
    moved = [vectors for name, step, vectors in checks if step > 0 and torch.equal(vectors, first[name])]
    assert not moved


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accuracy": 90}, r"accuracy must be from 0 to 1, got 90"),
        ({"seeds": ()}, r"seeds must be at least 1, got 0"),
        ({"images": 0}, r"images must be at least 1, got 0"),
        ({"check_every": 0}, r"check_every must be at least 1, got 0"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(UserError, match=words):
        initialisation.main(**options)
