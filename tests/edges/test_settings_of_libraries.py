"""Settings that Lightning, torch and the parser take, and that fail, or do something else, only in the run."""

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.command_line import error_of
from tests.training.runs import fit
from tokenlearn.cli import _check_filename, _named_in
from tokenlearn.data import PromptDataModule
from tokenlearn.diffusion import LastK
from tokenlearn.editing import Editing
from tokenlearn.errors import UserError, reason_of
from tokenlearn.main import main
from tokenlearn.models import StableDiffusion
from tokenlearn.objectives import ClassifierLoss
from tokenlearn.pipeline import Sampling
from tokenlearn.run_checks import check_trainer
from tokenlearn.setting_checks import Section, check_settings, parser_line
from tokenlearn.tokens import vectors_from_words
from tokenlearn.tokens.settings import TokenSettings
from tokenlearn.training import ClassTokens


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("accumulate_grad_batches", 0, "trainer.accumulate_grad_batches must be at least 1, got 0"),
        ("accumulate_grad_batches", -1, "must be at least 1, got -1"),
        ("check_val_every_n_epoch", 0, "trainer.check_val_every_n_epoch must be at least 1, got 0"),
        ("val_check_interval", 0, "trainer.val_check_interval must be above 0, got 0"),
        ("val_check_interval", 0.0, "must be above 0"),
        ("gradient_clip_val", -1.0, "trainer.gradient_clip_val must be at least 0, got -1.0"),  # would ascend
        ("gradient_clip_val", float("nan"), "got nan"),
        ("strategy", "ddp_spawn", "trainer.strategy ddp_spawn .* set it to ddp"),
    ],
)
def test_settings_of_the_trainer(name, value, expected):
    with pytest.raises(UserError, match=expected):
        check_trainer({name: value})


def test_settings_of_the_trainer_that_work():
    check_trainer({"accumulate_grad_batches": 2, "check_val_every_n_epoch": None, "val_check_interval": "00:00:01:00"})
    check_trainer({"gradient_clip_val": None, "strategy": "ddp", "val_check_interval": 0.5})


def test_errors_of_the_trainer_name_what_was_given():
    settings = Namespace(devices="-1", accelerator="cpu", max_steps=None)
    assert _named_in("`devices` should be above 0", settings) == " (got devices: '-1')"
    assert _named_in("max_steps and nothing else", settings) == ""


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("../../evil", "leads out of the folder of checkpoints"),
        ("/tmp/evil", "leads out of the folder"),
        ("a/../../evil", "leads out of the folder"),
        ("best-{step", "has braces that are not those of a figure"),
        ("best-}", "has braces"),
    ],
)
def test_names_of_checkpoints(tmp_path, filename, expected):
    with pytest.raises(UserError, match=rf"checkpoint\.filename .*{expected}"):
        _check_filename(ModelCheckpoint(tmp_path, filename))


@pytest.mark.parametrize("filename", [None, "best-step{step:06d}", "a/{epoch}", "best..1"])
def test_names_of_checkpoints_that_are_fine(tmp_path, filename):
    _check_filename(ModelCheckpoint(tmp_path, filename))


def task_with(tiny_models, optimizer, lr_scheduler=None):
    return ClassTokens(
        StableDiffusion(str(tiny_models / "pipeline")),
        ["wizard"],
        ClassifierLoss(str(tiny_models / "guide")),
        tokens=TokenSettings(),
        sampling=Sampling(steps=1),
        gradient=LastK(1),
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
    )


SGD, ADAM = torch.optim.SGD, torch.optim.Adam
SCHEDULES = torch.optim.lr_scheduler


@pytest.mark.parametrize(
    ("optimizer", "lr_scheduler", "expected"),
    [
        (lambda params: SGD(params, lr=-1.0), None, r"model\.optimizer is not possible \(Invalid learning rate: -1.0"),
        (lambda params: ADAM(params, fused=True, foreach=True), None, "model.optimizer is not possible"),
        (lambda params: ADAM(params, betas=(1.0, 1.0)), None, "Invalid beta parameter"),
        (SGD, lambda optimizer: SCHEDULES.OneCycleLR(optimizer, 1.0), r"model\.lr_scheduler is not possible"),
        (SGD, lambda optimizer: SCHEDULES.CosineAnnealingWarmRestarts(optimizer, 0), "lr_scheduler is not possible"),
    ],
)  # fmt: skip
def test_optimizers_and_schedules_that_cannot_be(tiny_models, optimizer, lr_scheduler, expected):
    with pytest.raises(UserError, match=f"{expected}.*; correct its settings"):
        task_with(tiny_models, optimizer, lr_scheduler)._new_optimizer()


@pytest.mark.parametrize(
    ("optimizer", "lr_scheduler", "expected"),
    [
        (lambda params: ADAM(params, lr=1e38), None, r"model\.optimizer cannot make a step .*overflow"),
        (lambda params: torch.optim.SparseAdam(list(params)), None, "model.optimizer cannot make a step .SparseAdam"),
        (lambda params: ADAM(params, capturable=True), None, "model.optimizer cannot make a step"),
        (SGD, lambda optimizer: SCHEDULES.StepLR(optimizer, 0), "model.lr_scheduler cannot make a step"),
        (SGD, lambda optimizer: SCHEDULES.CosineAnnealingLR(optimizer, 0), "model.lr_scheduler cannot make a step"),
    ],
)
def test_optimizers_and_schedules_that_cannot_make_a_step(tiny_models, optimizer, lr_scheduler, expected):
    data = PromptDataModule(["a {}"], batch_size=1, batches_per_epoch=1, validation_images=1, test_images=1)
    with pytest.raises(UserError, match=expected):
        fit(task_with(tiny_models, optimizer, lr_scheduler), data, max_steps=2)


def test_errors_of_a_task_are_not_those_of_its_optimizer(tiny_models):
    task = task_with(tiny_models, SGD)

    def fails(batch, batch_idx=0):
        raise RuntimeError("of the task")

    task.training_step = fails
    data = PromptDataModule(["a {}"], batch_size=1, batches_per_epoch=1, validation_images=1, test_images=1)
    with pytest.raises(RuntimeError, match="of the task"):
        fit(task, data, max_steps=1)


def test_figures_that_are_not_logged(tiny_config, capsys):
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/nope"}}
    changes = {"trainer.callbacks": [stopping], "model.init_args.judge": None, "trainer.max_steps": 2}
    line = error_of(["fit", "--config", tiny_config(changes)], capsys)
    assert "`val/nope` which is not available; set its monitor to one of " in line
    assert "val/guided_accuracy" in line


@pytest.mark.parametrize("number", [0, 1025, 2**40])
def test_numbers_of_vectors(number):
    with pytest.raises(UserError, match=rf"tokens\.num_vectors must be at (least 1|most 1024), got {number}"):
        TokenSettings(num_vectors=number)


@pytest.mark.parametrize("words", ["", " "])
def test_no_words_to_start_from(words):
    with pytest.raises(UserError, match=r"tokens\.initial_words is empty; .* null to search for one"):
        TokenSettings(initial_words=words)


def test_a_token_is_no_word_to_start_from(tiny_models):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    with pytest.raises(UserError, match=r"'<hat>' is no word; .* tokens\.initial_embeddings"):
        vectors_from_words("a <hat>", backbone.tokenizers[0], backbone.text_encoders[0], 1)


UNION = "Does not validate against any of the Union subtypes Subtypes: [<class 'X'>, <class 'NoneType'>] Errors: - "


def test_messages_of_the_parser_are_short():
    inner = f"Parser key \"rate\": {UNION}Expected a dot import path string: x - Expected a <class 'NoneType'>"
    outer = f"Parser key \"model\": {UNION}Problem with given class_path 'Y': {inner} - Expected a <class 'NoneType'>"
    found = parser_line(outer)
    assert found == (
        "model.rate has a value of another kind than expected (Expected a dot import path string: x); correct it"
    )
    assert parser_line("short") == "short"
    assert len(parser_line(f'Parser key "a": {"x" * 1000}')) < 320


@pytest.mark.parametrize("size", [(64, 100_000), (9, 1)])
def test_sizes_out_of_proportion(size):
    with pytest.raises(UserError, match=r"sampling\.size .* at most 8 times as long as the other"):
        Sampling(size=size)
    assert Sampling(size=(64, 512)).size == (64, 512)


@pytest.mark.parametrize(("value", "near"), [("ddmi", "ddim"), ("edit-friendly", "edit_friendly"), ("EDCT", "EDICT")])
def test_the_nearest_of_words_and_classes(value, near):
    with pytest.raises(UserError, match=rf"editing\.inversion must be .*, got '{value}'; did you mean '?{near}'?\?"):
        check_settings({"editing": {"inversion": value}}, {"editing": Section(Editing, named=False)})


def test_files_of_a_variant_that_no_part_has(tiny_models):
    with pytest.warns(UserWarning, match=r"has files in the variant nope, .* set model\.backbone\.variant to null"):
        StableDiffusion(str(tiny_models / "pipeline"), variant="nope")


def test_figures_of_tokens_that_are_not_trained(tiny_config, capsys):
    config = tiny_config({"model.init_args.sampling": {"steps": 1}, "data.init_args.test_images": 1})
    main(["validate", "--config", config])
    assert "the tokens of this validate are not trained, but at their start" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("", "ValueError"),
        ("a\n  b", "a b"),
        (f"{'Words of it. ' * 15}The rest is cut", ". ".join(["Words of it"] * 15)),
        ("word " * 100, f"{'word ' * 39}word ..."),
        ("x" * 300, f"{'x' * 200} ..."),
    ],
)
def test_reasons_end_with_a_sentence_or_a_word(message, expected):
    assert reason_of(ValueError(message)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model_index.json", "is a file; give the folder of a diffusers pipeline that it is in"),
        ("model.safetensors", "is a checkpoint in a single file"),
        ("https://huggingface.co/owner/name", "is an address; give its hub id"),
        ("hf://owner/name", "is an address"),
        ("no/such/folder", "model folder 'no/such/folder' does not exist"),
    ],
)
def test_models_that_are_files_or_addresses(tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    for file in ("model_index.json", "model.safetensors"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=expected):
        StableDiffusion(name)
