"""Classes of other libraries in a config: what is none of the expected kind, and what would touch frozen models."""

import os

import pytest
import torch

from tests.command_line import error_of
from tests.edges.test_settings_sweep import LONGEST
from tokenlearn.main import main

CALLBACKS = "lightning.pytorch.callbacks"
FOREIGN = {
    "model.class_path": ("os.system", "model must be a class of LightningModule"),
    "data.class_path": ("os.system", "data must be a class of LightningDataModule"),
    "model.init_args.backbone": ("os.system", "model.backbone must be a class of DiffusionBackbone"),
    "model.init_args.objective": ("builtins.eval", "model.objective must be a class of Objective"),
    "model.init_args.judge": ("subprocess.Popen", "model.judge must be a class of Objective"),
    "model.init_args.gradient": ("subprocess.Popen", "model.gradient must be a class of Gradient"),
    "model.init_args.optimizer": ("os.system", "model.optimizer must be a class of Optimizer"),
    "model.init_args.lr_scheduler": ("os.system", "model.lr_scheduler must be a class of LRScheduler"),
    "evaluation": ("os.system", "evaluation must be a class of Evaluation"),
    "trainer.logger": ("os.system", "trainer.logger must be a class of Logger"),
    "trainer.strategy": ("os.system", "trainer.strategy must be text or a class of Strategy"),
    "trainer.profiler": ("subprocess.Popen", "trainer.profiler must be a class of Profiler"),
    "trainer.callbacks": ("os.system", "trainer.callbacks must be a list of a class of Callback"),
}


@pytest.fixture(autouse=True)
def _nothing_is_run(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a command of a config was run")

    monkeypatch.setattr(os, "system", refuse)


@pytest.mark.parametrize("with_settings", [False, True])
@pytest.mark.parametrize("place", list(FOREIGN))
def test_foreign_classes_are_one_line(tiny_config, capsys, place, with_settings):
    name, expected = FOREIGN[place]
    chosen = {"class_path": name, "init_args": {"command": "touch evil"}} if with_settings else {"class_path": name}
    line = error_of(
        ["fit", "--config", tiny_config({place: name if place.endswith("class_path") else chosen})], capsys
    )
    assert expected in line
    assert f"'{name}', which is none" in line
    assert len(line) < LONGEST


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--trainer.callbacks", "os.system"], "trainer.callbacks must be a list of a class of Callback"),
        (["--trainer.callbacks+=os.system"], "trainer.callbacks+ must be a class of Callback, got 'os.system'"),
        (["--trainer.callbacks+=EarlyStoping"], "did you mean EarlyStopping?"),
        (["--trainer.callbacks+=[3]"], "trainer.callbacks+[0] must be a class of Callback, got 3"),
        (["--trainer.callbacks+=Timer", "--trainer.callbacks.duratio=1"], "did you mean 'duration'?"),
        (["--trainer.max_steps+=3"], "trainer.max_steps+ adds to a list, and this setting is a whole number"),
        (["--model.optimizer", f"{__name__}.without_annotation"], "model.optimizer must be a class of Optimizer"),
    ],
)
def test_foreign_classes_of_options(tiny_config, capsys, options, expected):
    assert expected in error_of(["fit", "--config", tiny_config(), *options], capsys)


def adam(params, lr: float = 0.1) -> torch.optim.Optimizer:
    """A function that makes what is asked for."""
    return torch.optim.Adam(params, lr=lr)


def without_annotation(params):
    """A function that does not say what it makes."""
    return torch.optim.Adam(params)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model.optimizer", f"{__name__}.adam"], f"{__name__}.adam"),
        (["--trainer.callbacks+=Timer", "--trainer.callbacks.interval=epoch"], "interval: epoch"),
        (
            ["--trainer.callbacks+=DeviceStatsMonitor", "--trainer.callbacks+=LearningRateMonitor"],
            "LearningRateMonitor",
        ),
        (["--trainer.callbacks+=[LearningRateMonitor]"], "LearningRateMonitor"),
        (["--data.templates+=a {} x", "--data.templates+", "b {}"], "b {}"),
    ],
)
def test_classes_of_the_right_kind(tiny_config, capsys, options, expected):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", tiny_config(), *options, "--print_config"])
    assert not stopped.value.code
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("given_as", [list, lambda callbacks: callbacks[0]])
@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        (
            "EMAWeightAveraging",
            {"decay": 0.5},
            "copies and averages the frozen models too; remove it, and let model.lr",
        ),
        ("WeightAveraging", {}, "copies and averages the frozen models too"),
        ("StochasticWeightAveraging", {"swa_lrs": 0.1}, "copies and averages the frozen models too"),
        ("BackboneFinetuning", {}, "trains the frozen models; remove it"),
        ("ModelPruning", {"pruning_fn": "l1_unstructured"}, "removes weights of the frozen models; remove it"),
    ],
)
def test_callbacks_of_all_weights_are_refused(tiny_config, capsys, tmp_path, name, settings, expected, given_as):
    callbacks = given_as([{"class_path": f"{CALLBACKS}.{name}", "init_args": settings}])
    line = error_of(["fit", "--config", tiny_config({"trainer.callbacks": callbacks})], capsys)
    assert f"trainer.callbacks has {name}, which {expected}" in line
    assert not (tmp_path / "run").exists()
