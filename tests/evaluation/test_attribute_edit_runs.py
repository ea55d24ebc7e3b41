"""Evaluations of real tasks on the tiny models, in Python and by the command line."""

import csv
import json

import datasets
import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import tiny_classifier, write_image_config
from tokenlearn.data import ImageDataModule
from tokenlearn.data.rows import HeldOut
from tokenlearn.editing import Editing
from tokenlearn.errors import UserError
from tokenlearn.evaluation import AttributeEdits, evaluation_of
from tokenlearn.main import main
from tokenlearn.models import StableDiffusion
from tokenlearn.tokens import load_embedding, save_embedding, vocabulary_norm_range
from tokenlearn.tokens.directions import PairTemplates
from tokenlearn.training import Caso

LABELS = ["smile", "hat", "black", "brown", "red"]
ATTRIBUTES = {"smile": None, "hair": ["black", "brown", "red"]}


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers")
    for name in ("guide", "judge"):
        tiny_classifier(folder / name, LABELS, multi_label=True)
    return folder


@pytest.fixture
def make(tiny_models, classifiers):
    def task(**options):
        settings = {"attributes": ATTRIBUTES, "judge": str(classifiers / "judge")}
        return Caso(StableDiffusion(str(tiny_models / "pipeline")), str(classifiers / "guide"), **(settings | options))

    return task


@pytest.fixture
def faces(tmp_path, monkeypatch):
    """A data set of sixteen images, half of which smile."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    smiles = [index % 2 == 0 for index in range(16)]
    pixels = [rng.integers(150 * smile, 150 * smile + 100, (20, 18, 3), dtype=np.uint8) for smile in smiles]
    datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in pixels], "smile": smiles},
        features=datasets.Features({"image": datasets.Image(), "smile": datasets.Value("bool")}),
    ).save_to_disk(tmp_path / "faces")
    return str(tmp_path / "faces")


def run(evaluation, data):
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(evaluation, datamodule=data, verbose=False)
    return evaluation.table


def held_out(source, **held):
    return ImageDataModule(source, batch_size=4, held_out=HeldOut(validation=1, test=3, **held), num_workers=0)


def test_the_default_evaluation_of_a_task(make, faces):
    task = make()
    evaluation = evaluation_of(task)
    assert isinstance(evaluation, AttributeEdits)
    assert evaluation.wrapped_task() is task
    assert not evaluation.evaluate_after_fit
    assert evaluation_of(evaluation) is evaluation
    with pytest.raises(UserError, match="evaluation"):
        evaluation_of(evaluation, AttributeEdits())


def test_every_image_counts_in_every_direction(make, faces):
    settings = AttributeEdits(editing=Editing(timestep=601, steps=5), strengths=[1.0, 3.0], strength=3.0)
    table = run(settings.of(make()), held_out(faces))
    assert [row.name for row in table.rows] == ["smile", "black", "brown", "red", "do nothing"]
    for row in table.rows[:-1]:
        assert row.cells["add"].images + row.cells["remove"].images == 3
        assert row.cells["random_token_add"].images == row.cells["add"].images
        assert row.cells["psnr"].value > 0
    names = {record.seed for record in table.records}
    assert len(names) == 3
    assert {record.method for record in table.records} == {"caso", "random token", "reconstruction"}
    edits = [record for record in table.records if record.method != "reconstruction"]
    assert {record.strength for record in edits if record.measure == "success"} == {1.0, 3.0}
    nothing = table.rows[-1].cells
    assert set(nothing) == {"add", "remove", "untouched_kept", "psnr", "perceptual_distance"}
    assert nothing["add"].images + nothing["remove"].images == 3 * 4
    assert nothing["untouched_kept"].images == 3 * 2
    assert table.summary["reconstruction_psnr"].value == nothing["psnr"].value


def test_a_judge_and_a_known_group_are_needed(make, faces):
    with pytest.raises(UserError, match=r"model\.judge"):
        run(AttributeEdits().of(make(judge=None)), held_out(faces))
    with pytest.raises(UserError, match=r"'style'.*evaluation\.group_column"):
        run(AttributeEdits(editing=Editing(601, 5), group_column="style").of(make()), held_out(faces))


def test_random_tokens_are_as_long_as_words_and_leave_the_learned_ones(make):
    task = make()
    learned = task.bank.vectors[0].clone()
    evaluation = AttributeEdits().of(task)
    conditions = evaluation.conditions()
    assert list(conditions) == ["caso", "random token"]
    assert [len(rows) for rows in conditions.values()] == [4, 4]
    ours, random = (conditions[method][0].present.prompt_embeds for method in conditions)
    assert not torch.allclose(ours, random)
    torch.testing.assert_close(task.pipeline.encode(["<smile>"]).prompt_embeds, ours)
    assert torch.equal(task.bank.vectors[0], learned)
    low, high = vocabulary_norm_range(task.backbone.text_encoders[0])
    for vectors in evaluation.random_bank().vectors:
        torch.testing.assert_close(vectors.norm(dim=1), torch.full((5,), (low + high) / 2))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strengths": [1, 2], "strength": 5}, r"strength 5.*strengths \[1, 2\]"),
        ({"strengths": []}, r"strengths.*\[\]"),
        ({"strengths": [-1.0, 1.0], "strength": 1.0}, r"strengths.*-1"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(UserError, match=words):
        AttributeEdits(**settings)


def test_the_command_leaves_a_table_and_images(tiny_models, classifiers, faces, tmp_path, capsys):
    model = {
        "class_path": "Caso",
        "init_args": {
            "backbone": {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_models / "pipeline")}},
            "classifier": str(classifiers / "guide"),
            "judge": str(classifiers / "judge"),
            "attributes": {"smile": None, "hat": None},
            "initialisation": {"kind": "words", "collapse_batches": 1},
        },
    }
    settings = {
        "editing": {"timestep": 601, "steps": 5},
        "strengths": [1.0, 3.0],
        "strength": 3.0,
        "prompts": {"smile": "a smiling king", "hat": "a king"},
        "watched": ["black", "smile"],
        "combinations": [["smile", "hat"]],
    }
    data = {"held_out": {"validation": 2, "test": 3, "transfer": 2}}

    def config(name, **changes):
        evaluation = {"class_path": "AttributeEdits", "init_args": settings | changes}
        return write_image_config(tmp_path, name, model, data, {"max_steps": 1}, evaluation=evaluation)

    main(["fit", "--config", config("run")])
    theirs = []
    for name in ("smile", "hat"):
        vectors = load_embedding(tmp_path / "run" / "embeddings" / f"{name}-tl.safetensors").vectors
        about = {"class": name, "prompt": f"a <ti-{name}>"}
        theirs.append(str(save_embedding(tmp_path / f"{name}.safetensors", f"<ti-{name}>", vectors, about)))
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    main(["test", "--config", config("test", embeddings=theirs), "--ckpt_path", checkpoint])
    out, folder = capsys.readouterr().out, tmp_path / "test"
    summary = json.loads((folder / "summary.json").read_text())
    assert {"untouched_kept", "rank_correlation", "transfer_other_pictures", "combination_1_all"} <= summary.keys()
    for method in ("prompt_editing", "textual_inversion", "random_token"):
        assert 0 <= summary[f"{method}_untouched_kept"] <= 1
    with (folder / "table.csv").open() as file:
        rows = {row["direction"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["smile", "hat", "do nothing", "other pictures", "smile + hat"]
    counted = {name: sum(int(row[f"{side}_images"] or 0) for side in ("add", "remove")) for name, row in rows.items()}
    assert counted == {"smile": 3, "hat": 3, "do nothing": 2 * 3, "other pictures": 4, "smile + hat": 3}
    for name in ("edits.png", "table.png", "records.csv"):
        assert (folder / name).is_file()
    assert "rank_correlation" in out
    with pytest.raises(SystemExit):
        main(["test", "--config", config("wrong", prompts={"hat": "a hat"}), "--ckpt_path", checkpoint])
    error = capsys.readouterr().err
    assert "evaluation.prompts" in error
    assert "'smile', only for hat" in error


PROMPTS = {
    "smile": "a portrait of a smiling man",
    "black": "a portrait of a king",
    "brown": "a portrait of a queen",
    "red": "a portrait of a clown",
}


def test_directions_are_made_of_the_prompts_and_judged_beside_the_others(make, faces):
    task = make()
    templates = PairTemplates(["a portrait of {}", "a photo of {}"], "a portrait of a man")
    settings = AttributeEdits(
        editing=Editing(timestep=601, steps=5),
        strengths=[2.0],
        strength=2.0,
        prompts=PROMPTS,
        directions=templates,
        direction_units=3.0,
        random_tokens=False,
    )
    conditions = settings.of(task).conditions()
    assert list(conditions) == ["caso", "prompt editing", "direction"]
    source = task.pipeline.unconditional().prompt_embeds
    means = {
        name: task.backbone.encode_prompts([f"a portrait of a {name}", f"a photo of a {name}"]).prompt_embeds
        for name in ("smiling man", "man", "king", "queen", "clown")
    }
    means = {name: states.mean(dim=(0, 1)) for name, states in means.items()}
    smile, black, *_ = conditions["direction"]
    close = {"rtol": 1e-4, "atol": 1e-5}
    smiling = 3 * (means["smiling man"] - means["man"])
    torch.testing.assert_close(smile.present.prompt_embeds, source + smiling, **close)
    torch.testing.assert_close(smile.absent.prompt_embeds, source - smiling, **close)
    others = (means["queen"] + means["clown"]) / 2
    torch.testing.assert_close(black.present.prompt_embeds, source + 3 * (means["king"] - others), **close)

    table = run(settings, held_out(faces))
    for row in table.rows[:-1]:
        assert row.cells["direction_add"].images == row.cells["add"].images
    assert {"direction_add_success", "direction_remove_success", "direction_untouched_kept"} <= table.summary.keys()
    with pytest.raises(UserError, match=r"evaluation\.prompts"):
        AttributeEdits(directions=templates)
    with pytest.raises(UserError, match=r"direction_units.*-1"):
        AttributeEdits(directions=templates, prompts=PROMPTS, direction_units=-1.0)
