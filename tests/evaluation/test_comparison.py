"""The command ``tokenlearn compare``: its table, that it repeats nothing, and its messages."""

import csv
import json
import signal

import pytest
import torch
import yaml
from PIL import Image

from tests.command_line import error_of
from tests.tiny import tiny_classifier
from tokenlearn.data.prompts import TEST_SEEDS
from tokenlearn.evaluation import compared_methods
from tokenlearn.evaluation.compared_methods import METHODS
from tokenlearn.evaluation.comparison import ACCURACY, comparison_table
from tokenlearn.evaluation.network_cost import NetworkCost
from tokenlearn.evaluation.records import Record
from tokenlearn.main import main
from tokenlearn.pipeline import Pipeline
from tokenlearn.stopping import Stopped
from tokenlearn.tokens import save_embedding

STEPS, UPDATES, CANDIDATES, IMAGES = 3, 2, 4, 3


@pytest.fixture
def settings(tiny_models, tmp_path):
    """All methods on tiny models."""
    for name in ("wizard", "pirate"):
        save_embedding(tmp_path / "tokens" / f"{name}-tl.safetensors", f"<{name}>", [torch.ones(2, 16)], {})
    return {
        "pretrained": str(tiny_models / "pipeline"),
        "classes": {"wizard": "man with a hat", "pirate": "man with glasses"},
        "judge": str(tiny_models / "judge"),
        "guide": str(tiny_models / "guide"),
        "prompts": ["a photo of a {}", "a portrait of a {}"],
        "embeddings": str(tmp_path / "tokens"),
        "images": IMAGES,
        "sampling": {"steps": STEPS, "guidance": 5.0},
        "settings": {
            "search": {"words": 4, "steps": 1},
            "neutral": "person",
            "concept": {"warmup_steps": 1},
            "candidates": CANDIDATES,
            "optimisation": {"steps": UPDATES},
        },
        "batch_size": 2,
        "output_dir": str(tmp_path / "out"),
    }


@pytest.fixture
def run(tmp_path, capsys):
    def compare(settings):
        (tmp_path / "compare.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        capsys.readouterr()
        main(["compare", "--config", str(tmp_path / "compare.yaml")])
        return rows_of(tmp_path / "out" / "table.csv")

    return compare


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_all_methods_in_one_table(run, settings, tmp_path, monkeypatch):
    table = run(settings)
    folder = tmp_path / "out"
    assert [row["method"] for row in table] == list(METHODS)
    cost = {row["method"]: (float(row["evaluations"]), float(row["cost"])) for row in table}
    sampled = 2 * STEPS  # classifier-free guidance evaluates twice
    for method in ("plain", "word", "described", "token", "direction"):
        assert cost[method] == (sampled, sampled), method
    assert cost["best_of"] == (CANDIDATES * sampled, CANDIDATES * sampled)
    assert cost["sega"][0] > sampled
    # Each update evaluates every step twice, once with a gradient; one sampling more gives the image.
    assert cost["doodl"] == (sampled * (2 * UPDATES + 1), sampled * (2 * UPDATES + 1) + 2 * sampled * UPDATES)
    for row in table:
        assert row["accuracy_images"] == str(2 * IMAGES)
        assert float(row["accuracy_low"]) <= float(row["accuracy"]) <= float(row["accuracy_high"])
        difference = float(row["accuracy"]) - float(table[0]["accuracy"])
        assert float(row["over_plain"]) == pytest.approx(difference, abs=2e-4)
    records = rows_of(folder / "records.csv")
    for method in METHODS:
        found = [
            (row["item"], row["seed"]) for row in records if (row["method"], row["measure"]) == (method, ACCURACY)
        ]
        assert found == [(name, str(TEST_SEEDS + place)) for name in ("wizard", "pirate") for place in range(IMAGES)]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["cost_doodl"] == cost["doodl"][1]
    assert summary["accuracy_plain_low"] <= summary["accuracy_plain"]
    sheet = Image.open(folder / "contact_sheet.png")
    assert sheet.height > 2 * len(METHODS) * 96

    # Nothing is made again, but what another setting concerns.
    made = []
    maker = compared_methods.ComparedMethods.maker
    monkeypatch.setattr(
        compared_methods.ComparedMethods,
        "maker",
        lambda methods, method, name: made.append((method, name)) or maker(methods, method, name),
    )
    before = (folder / "records.csv").read_bytes()
    assert run(settings) == table
    assert made == []
    assert (folder / "records.csv").read_bytes() == before
    run(settings | {"settings": settings["settings"] | {"candidates": 2}})
    assert set(made) == {("best_of", "wizard"), ("best_of", "pirate")}
    made.clear()
    vectors = [torch.zeros(2, 16)]
    save_embedding(tmp_path / "tokens" / "pirate-tl.safetensors", "<pirate>", vectors, {})
    (folder / "images" / "plain" / f"00-wizard-seed{TEST_SEEDS}.png").unlink()
    run(settings | {"settings": settings["settings"] | {"candidates": 2}})
    assert set(made) == {("token", "pirate"), ("plain", "wizard")}


def test_images_are_those_of_the_pipeline(run, settings, tmp_path):
    run(settings | {"methods": ["token"], "classes": ["pirate"], "images": 1})
    pipe = Pipeline.from_pretrained(settings["pretrained"], tokens=settings["embeddings"])
    (expected,) = pipe("a photo of a <pirate> pirate", seeds=[TEST_SEEDS], steps=STEPS, guidance=5.0, solver="DDIM")
    found = Image.open(tmp_path / "out" / "images" / "token" / f"00-pirate-seed{TEST_SEEDS}.png")
    assert list(found.get_flattened_data()) == list(expected.get_flattened_data())


def test_a_stopped_comparison_says_how_far_it_is(settings, tmp_path, monkeypatch, capsys):
    maker = compared_methods.ComparedMethods.maker

    def stopping(methods, method, name):
        if method == "described":
            raise Stopped(signal.SIGINT)
        return maker(methods, method, name)

    monkeypatch.setattr(compared_methods.ComparedMethods, "maker", stopping)
    chosen = settings | {"methods": ["plain", "described"], "classes": {"pirate": "man with glasses"}}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(chosen, sort_keys=False))
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config", str(tmp_path / "compare.yaml")])
    assert stopped.value.code == 130
    assert "3 of 6 images are done; the same command makes the others" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guide": None}, ["'doodl'", "guide"]),
        ({"guide": None, "methods": ["word"]}, ["'word'", "guide"]),
        ({"embeddings": []}, ["'token'", "embeddings"]),
        ({"classes": ["wizard"]}, ["'described'", "classes.wizard"]),
        ({"settings": {"concept": {"warmup_steps": 1}}}, ["'direction'", "settings.neutral"]),
        ({"settings": {"neutral": "person"}}, ["warmup_steps"]),
        ({"classes": {"ordinary person": "man"}}, ["embeddings", "'ordinary person'", "<pirate>"]),
        ({"classes": {"wizzard": "man"}}, ["'wizzard'", "'wizard'"]),
        ({"classes": {}}, ["classes is empty"]),
        ({"methods": ["plain", "plain"]}, ["methods has 'plain' twice"]),
        ({"methods": ["plan"]}, ["plan"]),
        ({"prompts": ["a photo"]}, ["prompts 'a photo'", "{}"]),
        ({"images": 0}, ["images", "0"]),
        ({"first_seed": -1}, ["first_seed", "-1"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_missing_is_one_line(settings, tmp_path, capsys, changes, words):
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(settings | changes, sort_keys=False))
    error = error_of(["compare", "--config", str(tmp_path / "compare.yaml")], capsys)
    for word in words:
        assert word in error


def test_a_judge_with_the_guides_weights_is_refused(settings, tmp_path, capsys):
    copy = tiny_classifier(tmp_path / "copy", ["ordinary person", "wizard", "pirate"])
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(settings | {"judge": str(copy)}, sort_keys=False))
    assert "the weights of the guide" in error_of(["compare", "--config", str(tmp_path / "compare.yaml")], capsys)


def test_differences_are_paired():
    """One method is right wherever the other is, and once more: the interval of the difference is narrow."""
    correct = {"plain": [1, 0, 1, 0, 0, 0], "token": [1, 0, 1, 0, 0, 1]}
    records = [
        Record(method, "wizard", "", measure, seed, value if measure == ACCURACY else 2.0)
        for method, values in correct.items()
        for seed, value in enumerate(values)
        for measure in (ACCURACY, "evaluations", "cost", "seconds")
    ]
    diversity = {("plain", "wizard"): 2.0, ("token", "wizard"): 1.0}
    table = comparison_table(records, ["plain", "token"], ["wizard"], judge="j", diversity=diversity)
    plain, token = (row.cells for row in table.rows)
    assert token["accuracy"].value == pytest.approx(0.5)
    assert token["over_plain"].value == pytest.approx(1 / 6)
    assert token["over_plain"].low == 0
    assert plain["over_plain"][:3] == (0, 0, 0)
    assert token["diversity"].value == 0.5
    assert token["seconds"].value == 2.0


def test_costs_count_gradients(tiny_models):
    backbone = Pipeline.from_pretrained(str(tiny_models / "pipeline")).backbone
    conditioning = backbone.encode_prompts(["a man", "a king"])
    latents = torch.zeros(2, 4, 8, 8)
    calls = []
    with NetworkCost(backbone, lambda: calls.append(1)) as cost:
        with torch.no_grad():
            backbone(latents, torch.tensor(10), conditioning)
        backbone(latents.requires_grad_(), torch.tensor(10), conditioning)
        assert (cost.evaluations, cost.differentiated, cost.total) == (4, 2, 8)
        cost.reset()
    with torch.no_grad():
        backbone(latents, torch.tensor(10), conditioning)
    assert (cost.evaluations, len(calls)) == (0, 2)
