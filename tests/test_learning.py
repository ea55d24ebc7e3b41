import logging
import warnings

import diffusers
import pytest
import torch
import transformers
import yaml

import tokenlearn as tl
from tokenlearn.main import main
from tokenlearn.quiet import quiet


@pytest.fixture
def task(tiny_models):
    return tl.ClassTokens(
        tl.StableDiffusion(str(tiny_models / "pipeline")),
        ["wizard", "pirate"],
        tl.ClassifierLoss(str(tiny_models / "guide")),
        judge=tl.ClassifierLoss(str(tiny_models / "judge")),
        sampling=tl.Sampling(steps=4, guidance=7.0),
        gradient=tl.LastK(2),
    )


def test_learn_trains_as_the_command_line_does(task, tiny_config, tmp_path):
    config = tiny_config({"trainer.max_steps": 2, "model.init_args.judge": None, "trainer.gradient_clip_val": 1.0})
    main(["fit", "--config", config])
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    with open(config) as file:
        settings = yaml.safe_load(file)["data"]["init_args"]
    tokens = tl.learn(task, tl.PromptDataModule(**settings), max_steps=2, accelerator="cpu")
    assert tokens.placeholders == ("<wizard>", "<pirate>")
    assert torch.equal(tokens.bank.vectors[0], state["bank.vectors.0"])
    assert tokens.metadata["<wizard>"]["class"] == "wizard"


def test_learned_tokens_are_a_copy(task):
    data = tl.PromptDataModule(["a {}"], batch_size=2, batches_per_epoch=1)
    tokens = tl.learn(task, data, max_steps=1, accelerator="cpu")
    before = tokens.bank.vectors[0].clone()
    tl.learn(task, data, max_steps=1, accelerator="cpu")
    assert torch.equal(tokens.bank.vectors[0], before)
    assert not torch.equal(task.bank.vectors[0], before)


def test_nothing_but_a_progress_bar_is_said_and_nothing_written(task, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        tl.learn(task, max_steps=1, accelerator="cpu", enable_progress_bar=False)
    assert capsys.readouterr() == ("", "")
    assert caplog.records == []
    assert list(tmp_path.iterdir()) == []


def test_default_data_is_for_tasks_of_prompts(tiny_models):
    backbone = tl.StableDiffusion(str(tiny_models / "pipeline"))
    with pytest.raises(tl.UserError, match=r"TextualInversion.*ImageDataModule"):
        tl.learn(tl.TextualInversion(backbone, {"smile": None}), max_steps=1)


def test_learn_checks_its_steps(task):
    with pytest.raises(tl.UserError, match=r"max_steps.*0"):
        tl.learn(task, max_steps=0)


def test_evaluate_returns_the_table(task):
    data = tl.PromptDataModule(["a {}"], test_images=2)
    table = tl.evaluate(task, data=data, accelerator="cpu", enable_progress_bar=False)
    assert table.summary.keys() == {"mean_accuracy_name", "mean_accuracy_start", "mean_accuracy_token"}
    assert [row.name for row in table.rows] == ["wizard", "pirate"]


@pytest.mark.parametrize("library", [diffusers, transformers])
def test_quiet_leaves_everything_as_it_was(library):
    log = library.utils.logging
    before = (log.get_verbosity(), log.is_progress_bar_enabled(), list(warnings.filters))
    with quiet():
        assert (log.get_verbosity(), log.is_progress_bar_enabled()) == (logging.ERROR, False)
    assert (log.get_verbosity(), log.is_progress_bar_enabled(), list(warnings.filters)) == before
    assert not logging.getLogger("lightning.pytorch.utilities.rank_zero").filters
