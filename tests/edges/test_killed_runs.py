"""Runs that are stopped or crash anywhere end, when they are continued, as if they had never stopped."""

import signal
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.command_line import error_of
from tokenlearn.errors import UserError
from tokenlearn.main import main
from tokenlearn.run_checks import checkpoint_path
from tokenlearn.tokens.checkpoint import read_checkpoint
from tokenlearn.training import ClassTokens


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
    embeddings = {
        path.name: load_file(path)["emb_params"] for path in sorted((run / "embeddings").glob("*.safetensors"))
    }
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
        (
            (VALIDATION, 6, "SIGINT"),
            4,
            "new",
        ),  # in the last batch of the third validation
        ((STEP, 6, "SIGTERM"), 4, "new"),  # in the last step: it is repeated, since its validation is not done
        ((STEP, 4, "crash"), 2, "new"),
        ((VALIDATION, 6, "crash"), 2, "same"),
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


def test_a_fit_that_has_no_steps_left_leaves_everything_in_a_new_folder(fit, folder, uninterrupted):
    assert fit("finished", "--ckpt_path", folder / "whole" / "checkpoints" / "last.ckpt") == 0
    found = results(folder / "finished")
    assert not found.pop("sheets")
    assert_same({name: value for name, value in uninterrupted.items() if name != "sheets"}, found)


def test_changed_settings_of_the_optimizer_apply(fit, folder, uninterrupted, capsys):
    last = folder / "whole" / "checkpoints" / "last.ckpt"
    scheduler = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 20}}
    changes = {
        "model.init_args.optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.5}},
        "model.init_args.lr_scheduler": scheduler,
        "trainer.max_steps": 7,
    }
    assert fit("faster", "--ckpt_path", last, changes=changes) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if "from step 6 on" in line)
    assert "model.optimizer.lr is 0.5, was 0.05; model.lr_scheduler.T_max is 20, was 6" in line
    state = torch.load(folder / "faster" / "checkpoints" / "last.ckpt", weights_only=True)
    expected = 0.25 * (1 + torch.tensor(7 * torch.pi / 20).cos())  # as if it had always been so
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(float(expected))
    assert state["optimizer_states"][0]["state"][0]["step"] == 7  # the moments went on


def test_a_folder_holds_one_fit(fit, folder, uninterrupted, tmp_path, capsys):
    config = (folder / "whole" / "config.yaml").read_text()
    assert str(folder / "whole") not in config  # it runs again elsewhere
    changes = {"model.init_args.sampling.steps": 3}
    assert fit("whole", changes=changes) == 2
    assert "checkpoints of a fit with other settings" in capsys.readouterr().err
    elsewhere = folder / "last.ckpt"
    elsewhere.write_bytes((folder / "whole" / "checkpoints" / "last.ckpt").read_bytes())
    assert fit("whole", "--ckpt_path", elsewhere, changes=changes) == 2
    assert (folder / "whole" / "config.yaml").read_text() == config
    assert_same(uninterrupted, results(folder / "whole"))


def test_checkpoints_that_are_none(tiny_config, folder, uninterrupted, tmp_path, capsys):
    last = folder / "whole" / "checkpoints" / "last.ckpt"
    whole = read_checkpoint(last)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "cut.ckpt").write_bytes(last.read_bytes()[:1000])
    torch.save({"state_dict": {"model.x": torch.zeros(1)}}, tmp_path / "foreign.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    torch.save(whole | {"state_dict": {"bank.vectors.0": torch.zeros(5, 16)}}, tmp_path / "damaged.ckpt")
    lost = ("loops", "optimizer_states")
    torch.save({name: whole[name] for name in whole if name not in lost}, tmp_path / "weights.ckpt")
    assert read_checkpoint(tmp_path / "weights.ckpt")["tokenlearn"] == whole["tokenlearn"]
    for path, words in {
        "missing.ckpt": "no checkpoint at",
        "folder": "is a folder",
        "cut.ckpt": "cannot be read",
        "empty.ckpt": "cannot be read",
        "foreign.ckpt": "of another program",
        "list.ckpt": "is no checkpoint",
        "damaged.ckpt": "is damaged",
        "weights.ckpt": "has weights alone",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            checkpoint_path(str(tmp_path / path), ClassTokens, resumes=True)
        assert "\n" not in str(caught.value)
    command = ["fit", "--config", tiny_config(), "--ckpt_path"]
    assert "outputs/NAME/TIME/checkpoints" in error_of([*command, "best"], capsys)
    assert "--output_dir" in error_of([*command, "last", "--output_dir", "null"], capsys)


def generation(tiny_models, target, task="Generate", **settings):
    backbone = {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_models / "pipeline")}}
    config = {
        "model": {"class_path": task, "init_args": {"backbone": backbone, "sampling": {"steps": 3}} | settings},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
    }
    if task == "Generate":
        config["data"] = {
            "class_path": "PromptList",
            "init_args": {"prompts": ["a king", "a portrait", "red"], "seeds": [1, 2], "batch_size": 2},
        }
    target.write_text(yaml.safe_dump(config))
    return target


SEGA = {
    "prompts": ["a portrait"],
    "seeds": [1, 2, 3, 4, 5, 6],
    "edits": [{"concept": "red", "scale": 4.0, "warmup_steps": 1}],
    "batch_size": 2,
}


def predict(config, run, *options, interrupt=None):
    config = yaml.safe_load(config.read_text())
    if interrupt is not None:
        arguments = dict(zip(("hook", "calls", "what"), interrupt, strict=True))
        config["trainer"]["callbacks"] = [{"class_path": f"{__name__}.Interrupt", "init_args": arguments}]
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    try:
        main(["predict", "--config", str(path), "--output_dir", str(run), *options])
    except SystemExit as stopped:
        return stopped.code
    except Crash:
        return None
    return 0


@pytest.mark.parametrize(("task", "settings"), [("Generate", {}), ("Sega", SEGA)], ids=["Generate", "Sega"])
def test_stopped_predictions(tiny_models, tmp_path, capsys, task, settings):
    config = generation(tiny_models, tmp_path / "config.yaml", task, **settings)
    assert predict(config, tmp_path / "whole") == 0
    run = tmp_path / "stopped"
    assert predict(config, run, interrupt=("on_predict_batch_start", 2, "SIGTERM")) == 143
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    assert "SIGTERM: 4 of 6 images are done" in line
    assert str(run) in line
    done = {path: path.stat().st_mtime_ns for path in run.rglob("images/**/*.png")}
    lost = min(done)  # one of a batch
    lost.unlink()
    assert predict(config, run, interrupt=("on_predict_batch_start", 3, "crash")) is None
    assert predict(config, run) == 0
    if task == "Sega":
        assert {path for path, when in done.items() if path.stat().st_mtime_ns != when} == {lost}
    files = [path.relative_to(tmp_path / "whole") for path in sorted((tmp_path / "whole").rglob("*.png"))]
    assert len(files) == (7 if task == "Generate" else 13)
    for file in files:
        assert (run / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_ctrl_c_before_the_first_step_stops_at_once(fit, capsys):
    assert fit("early", interrupt=("on_fit_start", 1, "SIGINT")) == 130
    assert "stopped by Ctrl-C: after step 0 of 6; the same command begins anew" in capsys.readouterr().err
