import json
import math

import lightning as L
import pytest
import torch
import yaml
from jsonargparse import auto_cli
from torch.utils.data import DataLoader

from benchmarks import caso_step, initialisation
from benchmarks.common import RowCounter, instantiate, parse_config
from tests.tiny import tiny_classifier
from tokenlearn.errors import UserError

BATCH, INVERSION_STEPS = 3, 4


@pytest.fixture
def config(tiny_models, tmp_path):
    """Write a config of two attributes, with changes of the model."""

    def write(**changes):
        options = {
            "backbone": {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_models / "pipeline")}},
            "classifier": str(tiny_classifier(tmp_path / "faces", ["smile", "hat"], multi_label=True)),
            "attributes": {"smile": None, "hat": None},
        }
        settings = {
            "model": {"class_path": "Caso", "init_args": options | changes},
            "trainer": {"gradient_clip_val": 1e-3},  # low, so that it does something
        }
        path = tmp_path / "caso.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    return write


@pytest.fixture
def fabric():
    return caso_step.CountingFabric(accelerator="cpu", devices=1)


def test_prints_ratios_and_evaluates_no_row_in_vain(config, capsys):
    caso_step.main(
        fit_config=config(),
        num_attributes=(1, 2),
        batch_size=BATCH,
        num_inversion_steps=INVERSION_STEPS,
        repetitions=2,
        accelerator="cpu",
    )
    lines = capsys.readouterr().out.splitlines()
    results = json.loads(lines[-1])
    ratios = ("step_over_floor", "official_over_ours")
    assert set(results) == {key + suffix for key in ratios for suffix in ("", "_attributes1", "_attributes2")}
    assert all(math.isfinite(value) and value > 0 for value in results.values())
    for key, worst in zip(ratios, (max, min), strict=True):
        assert results[key] == worst(results[f"{key}_attributes{count}"] for count in (1, 2))
    rows = [line.split() for line in lines[2:-1]]
    inverted = str(BATCH * (1 + INVERSION_STEPS))
    assert [(*row[:2], *row[3:]) for row in rows] == [
        (count, name, without_gradient, str(BATCH))
        for count in ("1", "2")
        for name, without_gradient in (("ours", str(BATCH)), ("floor", str(BATCH)), ("official", inverted))
    ]


def test_our_step_is_the_trainers(config, fabric):
    settings = parse_config(config())
    task, twin = (instantiate(settings, {}).model for _ in range(2))
    start = task.bank.vectors[0].detach().clone()
    ours = caso_step.caso_step(task, fabric, settings.trainer.gradient_clip_val)
    batch = caso_step.random_images(task, BATCH, "pixels")
    ours.batches = [batch]
    for _ in range(3):
        ours()
    trainer = L.Trainer(
        max_steps=3,
        gradient_clip_val=settings.trainer.gradient_clip_val,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(twin, DataLoader([batch] * 3, batch_size=None))
    assert not torch.allclose(task.bank.vectors[0], start)
    torch.testing.assert_close(task.bank.vectors[0], twin.bank.vectors[0])


def test_the_floor_edits_as_the_task_does(config, fabric, monkeypatch):
    task = instantiate(parse_config(config(edit={"guidance": 3.0})), {}).model
    floor, edited = caso_step.Floor(task, fabric, caso_step.random_images(task, BATCH, "latents")), []
    loss = floor.loss
    monkeypatch.setattr(floor, "loss", lambda latents, targets: edited.append(latents) or loss(latents, targets))
    floor()
    shipped = task.editor.edits(floor.noisy, floor.timesteps).edited([task.placeholders[0]] * BATCH)
    torch.testing.assert_close(edited[0], shipped, rtol=1e-4, atol=1e-4)
    assert floor.prompt_embeds.grad.abs().max() > 0


@pytest.mark.parametrize(("form", "encodings"), [("latents", 0), ("pixels", 1)])
def test_pixels_are_encoded_once_by_each(config, fabric, monkeypatch, form, encodings):
    task = instantiate(parse_config(config()), {}).model
    ours = caso_step.caso_step(task, fabric, None)
    batch = caso_step.random_images(task, BATCH, form)
    ours.batches = [batch]
    steps = [
        ours,
        caso_step.Floor(task, fabric, batch),
        caso_step.OfficialStep(ours, task, batch, INVERSION_STEPS),
    ]
    encode, calls = task.backbone.vae.encode, []
    monkeypatch.setattr(task.backbone.vae, "encode", lambda images: calls.append(len(images)) or encode(images))
    for step in steps:
        calls.clear()
        step()
        assert calls == [BATCH] * encodings


def test_inversion_needs_all_of_its_steps(config, fabric):
    task = instantiate(parse_config(config()), {}).model
    ours = caso_step.caso_step(task, fabric, None)
    ours.batches = [batch] = [caso_step.random_images(task, BATCH, "latents")]
    official, counter = caso_step.OfficialStep(ours, task, batch, 50), RowCounter(task.backbone.unet)
    counter.count(official)
    assert 401 in official.inverse.timesteps
    assert (counter.without_gradient, counter.with_gradient) == (51 * BATCH, BATCH)


@pytest.mark.parametrize(
    ("changes", "counts", "words"),
    [
        ({}, (1, 3), r"num_attributes .* 1 to 2, .*\(1, 3\)"),
        ({}, (0,), r"num_attributes .* 1 to 2"),
        ({"edit": {"noising": "inversion"}}, (1,), "edit.noising inversion"),
        ({"edit": {"gradient": {"class_path": "LastK"}}}, (1,), r"edit\.gradient LastK"),
    ],
)
def test_bad_settings(config, changes, counts, words):
    with pytest.raises(UserError, match=words):
        caso_step.main(fit_config=config(**changes), num_attributes=counts, accelerator="cpu")


@pytest.mark.parametrize("main", [caso_step.main, initialisation.main])
def test_the_command_line_names_the_config(main, tmp_path):
    with pytest.raises((UserError, FileNotFoundError, TypeError), match=r"nowhere\.yaml"):
        auto_cli(main, args=[f"--fit_config={tmp_path / 'nowhere.yaml'}"])
