"""Runs that are stopped or crash anywhere end, when they are continued, as if they had never stopped."""

import signal
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from tokenlearn.main import main


class Crash(BaseException):
    """An end that nobody handles, like that of a process which is killed."""


class Interrupt(L.Callback):
    """Sends a signal, or crashes, when a hook has been called a number of times."""

    def __init__(self, hook: str, calls: int, what: str) -> None:
        self.what, self.left = what, calls
        setattr(self, hook, self._count)

    def _count(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            if self.what == "crash":
                raise Crash
            signal.raise_signal(signal.Signals[self.what])


STEPS = 6
CODES = {"SIGTERM": 143, "SIGINT": 130}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("killed")


@pytest.fixture
def fit(tiny_config, folder):
    """Run a fit of six steps with two an epoch; gives the exit code, 0 without one, None for a crash."""

    def run(name, *options, interrupt=None, changes=None):
        settings = {
            "model.init_args.judge": None,
            "model.init_args.optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}},
            "model.init_args.lr_scheduler": {
                "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
                "init_args": {"T_max": STEPS},
            },
            "data.init_args.eval_batch_size": 2,  # two batches a validation
            "trainer.max_steps": STEPS,
            "trainer.logger": False,
            "image_grid": {"every_n_validations": 2},
            "output_dir": str(folder / name),
        } | (changes or {})
        if interrupt is not None:
            hook, calls, what = interrupt
            arguments = {"hook": hook, "calls": calls, "what": what}
            settings["trainer.callbacks"] = [{"class_path": f"{__name__}.Interrupt", "init_args": arguments}]
        try:
            main(["fit", "--config", tiny_config(settings), *map(str, options)])
        except SystemExit as stopped:
            return stopped.code
        except Crash:
            return None
        return 0

    return run


def results(run: Path) -> dict[str, object]:
    """Everything that a fit leaves but the times."""
    embeddings = {path.name: load_file(path)["emb_params"] for path in sorted((run / "embeddings").glob("*"))}
    (best,) = (run / "checkpoints").glob("best-*.ckpt")
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    sheets = {path.name: path.read_bytes() for path in (run / "validation").glob("step-*.png")}
    return {
        "embeddings": embeddings,
        "best": best.name,
        "score": [state["best_model_score"] for name, state in last["callbacks"].items() if "ModelCheckpoint" in name],
        "step": last["global_step"],
        "last": last["state_dict"]["bank.vectors.0"],
        "moments": last["optimizer_states"][0]["state"],
        "sheets": sheets,
    }


def assert_same(first: object, second: object) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


@pytest.fixture(scope="module")
def whole(folder):
    return {}


@pytest.fixture
def uninterrupted(fit, folder, whole):
    if not whole:
        assert fit("whole") == 0
        whole.update(results(folder / "whole"))
    return whole


STEP, VALIDATION = "on_before_zero_grad", "on_validation_batch_start"


@pytest.mark.parametrize(
    ("interrupt", "step", "place"),
    [
        ((STEP, 1, "SIGTERM"), 1, "same"),  # within an epoch
        ((STEP, 3, "SIGINT"), 3, "new"),
        ((STEP, 4, "SIGTERM"), 4, "same"),  # in the last step of an epoch: stops in the validation
        ((VALIDATION, 4, "SIGINT"), 4, "new"),  # in the last batch of a validation
        ((STEP, 6, "SIGTERM"), 4, "new"),  # in the last step: it is repeated, since its validation is not done
        ((STEP, 4, "crash"), 2, "new"),
        ((VALIDATION, 4, "crash"), 2, "same"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_stopped_fit(fit, folder, uninterrupted, capsys, interrupt, step, place):
    name = "-".join(map(str, interrupt))
    assert fit(name, interrupt=interrupt) == CODES.get(interrupt[2])
    last = folder / name / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == step
    if interrupt[2] in CODES:
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tokenlearn: stopped")]
        assert f"of {STEPS}; continue from step {step} " in line
        assert line.endswith(f"--ckpt_path {last}")
    again = name if place == "same" else f"{name}-again"
    assert fit(again, "--ckpt_path", last) == 0
    expected, found = uninterrupted, results(folder / again)
    if place == "new":  # the sheets of the first steps are in the first folder
        expected, found = ({name: value for name, value in r.items() if name != "sheets"} for r in (expected, found))
    assert_same(expected, found)
