"""Whole trainings of class tokens: the same however they are cut, and none that goes on with numbers that are not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tokenlearn as tl
from tests.tiny_clip import tiny_clip
from tests.training.runs import fit
from tokenlearn.data import PromptDataModule
from tokenlearn.diffusion import LastK
from tokenlearn.errors import UserError
from tokenlearn.main import main
from tokenlearn.objectives import ClassifierLoss
from tokenlearn.pipeline import Pipeline, Sampling
from tokenlearn.training import ClassTokens


@pytest.fixture
def run(backbone, tiny_models, tmp_path):
    """Train for a number of steps; returns the vectors."""

    def train(max_steps, name="run", lr_scheduler=None, data=None, **trainer):
        task = ClassTokens(
            backbone,
            {"wizard": "man with a hat", "pirate": None},
            ClassifierLoss(str(tiny_models / "guide")),
            sampling=Sampling(steps=4, guidance=7.0),
            gradient=LastK(2),
            lr_scheduler=lr_scheduler,
        )
        settings = {"batch_size": 2, "batches_per_epoch": 2, "validation_images": 2, "eval_batch_size": 4}
        prompts = PromptDataModule(["a photo of a {}", "a portrait of a {}"], **(settings | (data or {})))
        fit(task, prompts, max_steps=max_steps, folder=tmp_path / name, **trainer)
        return task.bank.vectors[0].detach().clone()

    return train


def test_accumulation_equals_one_large_batch(run):
    large = run(2, data={"batch_size": 4}, gradient_clip_val=0.01)
    small = run(2, data={"batches_per_epoch": 4}, gradient_clip_val=0.01, accumulate_grad_batches=2)
    torch.testing.assert_close(small, large, rtol=0, atol=1e-5)


def test_killed_and_resumed_equals_uninterrupted(run, tmp_path):
    def cosine(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7)

    whole = run(7, "whole", cosine, {"batches_per_epoch": 4})
    for stop in (3, 4):  # in the middle and at the end of an epoch
        part = run(stop, f"part{stop}", cosine, {"batches_per_epoch": 4})
        assert not torch.equal(part, whole)
        last = str(tmp_path / f"part{stop}" / "last.ckpt")
        assert torch.equal(run(7, f"rest{stop}", cosine, {"batches_per_epoch": 4}, ckpt_path=last), whole)


def test_bf16_keeps_tokens_in_fp32(run):
    assert run(1, precision="bf16-mixed").dtype == torch.float32


def not_finite_at(step, monkeypatch):
    """Let the images of one training step overflow."""
    steps = []
    generate = Pipeline.generate

    def overflow(self, *args, gradient=None, **options):
        images = generate(self, *args, gradient=gradient, **options)
        steps.extend([1] if gradient is not None else [])
        return images * float("nan") if gradient is not None and len(steps) == step + 1 else images

    monkeypatch.setattr(Pipeline, "generate", overflow)


def test_a_loss_that_is_not_finite_stops_the_training(run, monkeypatch):
    not_finite_at(2, monkeypatch)
    with pytest.raises(UserError, match="not finite at step 2"):
        run(4)


def last_tokens(config):
    run = Path(yaml.safe_load(Path(config).read_text())["output_dir"])
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["state_dict"]["bank.vectors.0"]


def test_two_processes_equal_one(tiny_config, run, tmp_path):
    changes = {
        "model.init_args.judge": None,
        "trainer.max_steps": 2,
        "trainer.devices": 2,
        "trainer.strategy": "ddp",
        "output_dir": str(tmp_path / "two"),
    }
    config = tiny_config(changes, "two")
    command = [sys.executable, "-m", "tokenlearn", "fit", "--config", config]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(last_tokens(config), run(2, data={"batch_size": 4}), rtol=0, atol=1e-5)


def test_the_command_line_keeps_the_last_good_files(tiny_config, tmp_path, monkeypatch, capsys):
    not_finite_at(2, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", tiny_config()])
    assert stopped.value.code == 2
    assert "not finite at step 2" in capsys.readouterr().err.strip().splitlines()[-1]
    (vectors,) = load_file(tmp_path / "run" / "embeddings" / "wizard-tl.safetensors").values()
    assert vectors.isfinite().all()


def test_fit_by_class_means_from_the_word_that_they_choose(tiny_config, tmp_path, capsys):
    objective = "model.init_args.objective.init_args.form"
    main(["fit", "--config", tiny_config({objective: "class_mean", "model.init_args.tokens.initial_words": None})])
    capsys.readouterr()
    tokens = tl.load_tokens(str(tmp_path / "run" / "embeddings" / "wizard-tl.safetensors"))
    metadata = tokens.metadata["<wizard>"]
    assert (metadata["objective"], metadata["form"]) == ("ClassifierLoss", "class_mean")
    assert json.loads(metadata["config"])["initial_words"]


def test_fit_leaves_everything_that_it_names(tiny_config, tmp_path, capsys):
    main(["fit", "--config", tiny_config()])
    run = tmp_path / "run"
    out = capsys.readouterr().out
    assert out.strip().splitlines()[-1] == str(run)
    summary = json.loads((run / "summary.json").read_text())
    assert {"judged_accuracy_step0", "judged_accuracy_after", "embeddings", "minutes"} <= summary.keys()
    assert summary["embeddings"] == [
        str(run / "embeddings" / f"{name}-tl.safetensors") for name in ("wizard", "pirate")
    ]
    for path in summary["embeddings"]:
        assert path in out
        (vectors,) = load_file(path).values()
        assert vectors.shape == (1, 16)
    for name in ("config.yaml", "table.csv", "table.png", "before_after.png"):
        assert (run / name).is_file()
    assert list(run.glob("events.out.tfevents*"))
    assert list((run / "validation").glob("*.png"))
    for checkpoint in (run / "checkpoints").glob("*.ckpt"):
        assert checkpoint.stat().st_size < 2**20
    assert not list(run.rglob(".*-*"))


@pytest.mark.parametrize("summed", [False, True], ids=["text", "sum"])
def test_the_best_tokens_are_chosen_by_the_loss_of_whatever_objective(tiny_config, tiny_models, tmp_path, summed):
    clip = {
        "class_path": "CLIPTextLoss",
        "init_args": {"clip": str(tiny_clip(tmp_path / "clip")), "text": "a photo of a {}"},
    }
    guide = {"class_path": "ClassifierLoss", "init_args": {"classifier": str(tiny_models / "guide")}}
    path = tiny_config({"model.init_args.objective": [guide, clip] if summed else clip})
    main(["fit", "--config", path, "--trainer.max_steps", "2"])
    assert len(list((tmp_path / "run" / "embeddings").glob("*.safetensors"))) == 2
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    chosen = {state["monitor"]: state for name, state in saved.items() if name.startswith("ModelCheckpoint")}
    assert list(chosen) == ["val/loss"]
    exported = next(state["best"] for name, state in saved.items() if name.startswith("EmbeddingExport"))
    assert exported == pytest.approx(float(chosen["val/loss"]["best_model_score"]))


@pytest.mark.parametrize("section", ["checkpoint", "embedding_export"])
def test_the_worst_tokens_are_not_kept_by_mistake(tiny_config, capsys, section):
    with pytest.raises(SystemExit):
        main(["fit", "--config", tiny_config({}), f"--{section}.monitor=val/loss"])
    assert f"{section}.monitor 'val/loss' with {section}.mode max would keep the worst" in capsys.readouterr().err


def test_another_figure_can_choose_the_best_tokens(tiny_config, tmp_path):
    other = [f"--{section}.monitor=val/guided_accuracy" for section in ("checkpoint", "embedding_export")]
    main(["fit", "--config", tiny_config({}), "--trainer.max_steps", "2", *other])
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    chosen = next(state for name, state in saved.items() if name.startswith("ModelCheckpoint"))
    exported = next(state["best"] for name, state in saved.items() if name.startswith("EmbeddingExport"))
    assert chosen["monitor"] == "val/guided_accuracy"
    assert exported == pytest.approx(float(chosen["best_model_score"]))
    assert 0 <= exported <= 1  # a share, not a loss
