"""Commands, checkpoints and precisions that a run cannot use are refused before a model is loaded."""

import os
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem

from tests.command_line import error_of
from tokenlearn.data.interfaces import TaskWrapper
from tokenlearn.errors import UserError
from tokenlearn.evaluation import SegaEvaluation, evaluates
from tokenlearn.generation import Edit, Generate
from tokenlearn.run_checks import check_data, check_precision, check_seed, checkpoint_path, commands_of
from tokenlearn.tokens.checkpoint import checkpoint_about, read_checkpoint
from tokenlearn.training import Caso, ClassTokens


@pytest.mark.parametrize(
    ("task", "commands"),
    [
        (ClassTokens, ["fit", "validate", "test"]),
        (Caso, ["fit", "validate", "test"]),
        (Generate, ["predict"]),
        (Edit, ["predict"]),
        (SegaEvaluation, ["test"]),
        (L.LightningModule, []),
    ],
)
def test_commands_of_a_task(task, commands):
    assert commands_of(task, evaluates) == commands


def test_the_wrong_command_names_the_right_one(tiny_config, capsys):
    error = error_of(["predict", "--config", tiny_config()], capsys)
    assert "ClassTokens makes no images: this config is for 'fit' or 'validate' or 'test', not for 'predict'" in error
    assert "--config portraits/generate --ckpt_path" in error


@pytest.fixture
def checkpoint():
    return {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {"bank.vectors.0": torch.zeros(3, 16)},
        "optimizer_states": [],
        "lr_schedulers": [],
        "loops": {},
        "tokenlearn": {
            "base_model": "model",
            "vocabulary_hash": "hash",
            "num_vectors": {"<a>": 1, "<b>": 2},
            "embedding_widths": [16],
            "metadata": {"<a>": {}, "<b>": {}},
        },
    }


def test_a_checkpoint_is_accepted(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(checkpoint, tmp_path / "last.ckpt")
    assert checkpoint_path("~/last.ckpt", ClassTokens, resumes=True) == str(tmp_path / "last.ckpt")


def test_a_checkpoint_at_an_address(checkpoint):
    address = "memory://bucket/last.ckpt"
    with pytest.raises(UserError, match=rf"cannot read the checkpoint at '{address}' .*; give a .ckpt file"):
        checkpoint_path(address, ClassTokens, resumes=True)
    for content, words in ((checkpoint, None), ([1], "is no checkpoint"), (b"text", "cannot be read")):
        with get_filesystem(address).open(address, "wb") as file:
            file.write(content) if isinstance(content, bytes) else torch.save(content, file)
        if words is None:
            assert checkpoint_path(address, ClassTokens, resumes=True) == address
        else:
            with pytest.raises(UserError, match=f"'{address}' {words}"):
                checkpoint_path(address, ClassTokens, resumes=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.pop("optimizer_states"), "has weights alone"),
        (lambda content: content.pop("pytorch-lightning_version"), "a checkpoint of another program"),
        (lambda content: content.pop("tokenlearn"), "holds no learned tokens"),
        (lambda content: content.update(state_dict={}), "holds no learned tokens"),
        (lambda content: content.pop("state_dict"), "is no checkpoint: it has no state_dict"),
        (lambda content: content["tokenlearn"].pop("metadata"), "has no 'metadata'"),
        (lambda content: content["tokenlearn"].update(num_vectors=5), "has no 'num_vectors'"),
        (lambda content: content["tokenlearn"].update(num_vectors={"<a>": "x"}), "it is damaged"),
        (lambda content: content["state_dict"].update({"bank.vectors.0": torch.zeros(2, 16)}), "it is damaged"),
    ],
)
def test_damaged_checkpoints(checkpoint, tmp_path, change, words):
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=words):
        checkpoint_path(str(tmp_path / "last.ckpt"), ClassTokens, resumes=True)


def test_weights_alone_are_enough_for_images(checkpoint, tmp_path):
    del checkpoint["optimizer_states"]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    assert checkpoint_path(str(tmp_path / "last.ckpt"), Generate, resumes=False) == str(tmp_path / "last.ckpt")
    assert checkpoint_about(read_checkpoint(tmp_path / "last.ckpt"))["num_vectors"] == {"<a>": 1, "<b>": 2}


def test_what_is_no_checkpoint(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "last.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:500])
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "pirate.safetensors").touch()
    torch.save([1], tmp_path / "list.ckpt")
    os.mkfifo(tmp_path / "fifo.ckpt")
    for name, words in {
        "missing.ckpt": "no checkpoint at",
        "cut.ckpt": "cannot be read",
        "empty.ckpt": "cannot be read",
        "text.ckpt": "cannot be read",
        "list.ckpt": "is no checkpoint",
        "fifo.ckpt": "is no regular file",
        "pirate.safetensors": "is an embedding file",
    }.items():
        with pytest.raises(UserError, match=words):
            checkpoint_path(str(tmp_path / name), ClassTokens, resumes=False)
    with pytest.raises(UserError, match="is a folder; it has"):
        checkpoint_path(str(tmp_path), ClassTokens, resumes=False)


@pytest.mark.parametrize("word", ["best", "last", "hpc"])
def test_words_that_a_command_does_not_know(word):
    with pytest.raises(UserError, match="outputs/NAME/TIME/checkpoints/"):
        checkpoint_path(word, ClassTokens, resumes=True)


@pytest.mark.parametrize("precision", ["32-true", "32", "16-mixed", "bf16-mixed", "None"])
def test_precisions_that_work(precision):
    check_precision(ClassTokens, precision)


@pytest.mark.parametrize(
    ("precision", "instead"),
    [("bf16-true", "bf16-mixed"), ("16-true", "16-mixed"), ("64-true", "32-true"), ("64", "32-true")],
)
def test_precisions_that_do_not(precision, instead):
    for task in (ClassTokens, Generate, SegaEvaluation):
        with pytest.raises(UserError, match=f"set trainer.precision to {instead}"):
            check_precision(task, precision)
    check_precision(L.LightningModule, precision)  # a task from outside the package
    assert issubclass(SegaEvaluation, TaskWrapper)


def test_seeds():
    for seed in (True, False, 0, 2**32 - 1):
        check_seed(seed)
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match="seed_everything must be from 0 to 4294967295"):
            check_seed(seed)


def data_of(name):
    return {"data": None if name is None else SimpleNamespace(class_path=f"tokenlearn.data.{name}")}


@pytest.mark.parametrize(
    ("task", "command", "data", "words"),
    [
        (ClassTokens, "fit", None, "ClassTokens needs data for 'fit', and there is no data section; add one"),
        (ClassTokens, "validate", None, "ClassTokens needs data for 'validate'"),
        (Generate, "predict", None, "Generate needs data for 'predict'"),
        (ClassTokens, "fit", "PromptList", "data PromptList has nothing for 'fit' of ClassTokens; name another class"),
        (Generate, "predict", "PromptDataModule", "data PromptDataModule has nothing for 'predict' of Generate"),
        (Edit, "predict", "PromptList", "Edit takes its images from its own settings; leave out the data section"),
    ],
)
def test_data_that_a_run_lacks_or_does_not_use(task, command, data, words):
    with pytest.raises(UserError, match=words):
        check_data(task.__name__, task, command, data_of(data))


@pytest.mark.parametrize(
    ("task", "command", "data"),
    [
        (ClassTokens, "fit", "PromptDataModule"),
        (Generate, "predict", "PromptList"),
        (Edit, "predict", None),
        (SegaEvaluation, "test", None),
    ],
)
def test_data_that_a_run_has(task, command, data):
    check_data(task.__name__, task, command, data_of(data))
