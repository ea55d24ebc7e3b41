"""Checks of a run before its models are loaded: the command, the checkpoint and the precision."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging, WeightAveraging

from tokenlearn.data.interfaces import TaskWrapper
from tokenlearn.errors import UserError, check_at_least, reason_of
from tokenlearn.token_task import TokenTask
from tokenlearn.tokens.checkpoint import WAY_OUT, checkpoint_about, checkpoint_content, read_checkpoint

_STEPS = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}
_RESULTS = {
    "fit": "learns nothing",
    "validate": "has no validation",
    "test": "has no test",
    "predict": "makes no images",
}
_LOADERS = {"fit": "train_dataloader", "validate": "val_dataloader", "predict": "predict_dataloader"}
"""Commands whose batches are those of the data section, unless the task has its own."""

_LARGEST_SEED = 2**32 - 1
_LIGHTNING_WORDS = ("best", "last", "hpc", "registry")
"""Values of ``ckpt_path`` that Lightning looks up in the run before, which a command does not have."""

_AVERAGES = (
    "copies and averages the frozen models too",
    ", and let model.lr_scheduler lower the learning rate instead",
)
_CALLBACKS_OF_ALL_WEIGHTS: dict[type, tuple[str, str]] = {
    WeightAveraging: _AVERAGES,
    StochasticWeightAveraging: _AVERAGES,
    BaseFinetuning: ("trains the frozen models", ", because a fit trains the tokens alone"),
    ModelPruning: ("removes weights of the frozen models", ", and give a smaller model.backbone instead"),
}
"""Callbacks to what they would do to a task, and what to do in their place."""


def check_command(
    command: str,
    config: Any,  # noqa: ANN401 - jsonargparse's namespace
    evaluates: Callable[[type], bool],
) -> None:
    """Refuse a command that the task has nothing for, and a checkpoint or precision that it cannot use.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        config: settings of the command; ``~`` in its ``ckpt_path`` is expanded here.
        evaluates: whether there is an evaluation of a class of tasks.

    Raises:
        UserError: naming what to use in its place.
    """
    module, _, name = config.model.class_path.rpartition(".")
    task = getattr(importlib.import_module(module), name)
    if not isinstance(task, type):  # a function that makes the task
        return
    possible = commands_of(task, evaluates)
    if command not in possible and not (command == "test" and config.get("evaluation") is not None):
        others = " or ".join(f"'{other}'" for other in possible) or "another class"
        raise UserError(
            f"{name} {_RESULTS[command]}: this config is for {others}, not for '{command}'{_next_step(task, command)}"
        )
    check_data(name, task, command, config)
    check_seed(config.seed_everything)
    check_trainer(config.trainer)
    if config.get("ckpt_path") is not None:
        config.ckpt_path = checkpoint_path(config.ckpt_path, task, resumes=command == "fit")
    check_precision(task, str(config.trainer.precision))
    if command == "fit" and issubclass(task, TokenTask):
        check_callbacks(config.trainer.callbacks)


def check_data(
    name: str,
    task: type,
    command: str,
    config: Any,  # noqa: ANN401 - jsonargparse's namespace
) -> None:
    """Refuse a run without data for the command, unless its task makes its own batches, and data beside these.

    Raises:
        UserError: naming the task, and the command or the class of the data.
    """
    loader = _LOADERS.get(command)
    if loader is None:
        return
    data = config.get("data")
    has_own = getattr(task, loader) is not getattr(L.LightningModule, loader)
    if has_own and data is not None and command == "predict":
        raise UserError(f"{name} takes its images from its own settings; leave out the data section")
    if has_own:
        return
    if data is None:
        raise UserError(
            f"{name} needs data for '{command}', and there is no data section; add one, as the configs of the "
            "package have it, or name a class with --data"
        )
    module, _, cls = data.class_path.rpartition(".")
    found = getattr(importlib.import_module(module), cls)
    if isinstance(found, type) and getattr(found, loader) is getattr(L.LightningDataModule, loader):
        raise UserError(
            f"data {cls} has nothing for '{command}' of {name}; name another class in data, as the configs of the "
            "package do"
        )


def commands_of(task: type, evaluates: Callable[[type], bool]) -> list[str]:
    """Commands that a class has something for."""
    return [
        command
        for command, step in _STEPS.items()
        if getattr(task, step) is not getattr(L.LightningModule, step) or (command == "test" and evaluates(task))
    ]


def _next_step(task: type, command: str) -> str:
    if command == "predict" and issubclass(task, TokenTask):
        return "; its tokens make images with 'predict --config portraits/generate --ckpt_path CHECKPOINT'"
    return ""


def checkpoint_path(path: str, task: type, *, resumes: bool) -> str:
    """The path or address of a checkpoint that a task can load, with ``~`` expanded.

    Args:
        path: value of ``ckpt_path``.
        task: class of the task.
        resumes: whether training continues, which takes more than the tokens.

    Raises:
        UserError: if there is no file, or it is no checkpoint for such a task.
    """
    if path in _LIGHTNING_WORDS:
        name = path if path == "last" else "best-step000100"
        raise UserError(
            f"ckpt_path '{path}' is known within a run alone; give the file, such as "
            f"outputs/NAME/TIME/checkpoints/{name}.ckpt"
        )
    if not path.strip():
        raise UserError("ckpt_path is empty; give a .ckpt file that 'tokenlearn fit' wrote, or leave it out")
    remote = "://" in path
    local = path if remote else str(Path(path).expanduser())
    checkpoint = _remote_checkpoint(path) if remote else read_checkpoint(local)
    if "pytorch-lightning_version" not in checkpoint:
        raise UserError(f"'{local}' is a checkpoint of another program; give a .ckpt file that 'tokenlearn fit' wrote")
    if issubclass(task, TokenTask | TaskWrapper):
        checkpoint_about(checkpoint)
    if resumes and not {"optimizer_states", "lr_schedulers", "loops"} <= checkpoint.keys():
        raise UserError(
            f"checkpoint '{local}' has weights alone, so the fit cannot continue from it; start anew from its tokens "
            "with 'tokenlearn export' and model.tokens.initial_embeddings"
        )
    return local


def _remote_checkpoint(address: str) -> dict[str, Any]:
    """Content of a checkpoint at an address such as ``s3://bucket/last.ckpt``."""
    try:
        with get_filesystem(address).open(address, "rb") as file:
            content = io.BytesIO(file.read())
    except ImportError:  # of the package for this kind of address, which the command line names
        raise
    except Exception as error:  # of as many kinds as there are kinds of addresses
        raise UserError(f"cannot read the checkpoint at '{address}' ({reason_of(error)}); {WAY_OUT}") from error
    return checkpoint_content(content, address)


def check_seed(seed: bool | int) -> None:
    """Refuse a seed that numpy's generator does not take.

    Raises:
        UserError: naming the range.
    """
    if seed is not True and not 0 <= seed <= _LARGEST_SEED:
        raise UserError(f"seed_everything must be from 0 to {_LARGEST_SEED}, or false, got {seed}")


def check_trainer(settings: Any) -> None:  # noqa: ANN401 - jsonargparse's namespace
    """Refuse settings of the trainer that it takes and then fails with, or that would turn gradients round.

    Args:
        settings: the section ``trainer``.

    Raises:
        UserError: naming the setting.
    """
    counts = ("accumulate_grad_batches", "check_val_every_n_epoch")
    check_at_least("trainer", 1, **{name: settings.get(name) for name in counts})
    check_at_least("trainer", 0, gradient_clip_val=settings.get("gradient_clip_val"))
    interval = settings.get("val_check_interval")
    if interval == 0:
        raise UserError(
            "trainer.val_check_interval must be above 0, got 0; set trainer.limit_val_batches to 0 for none"
        )
    strategy = settings.get("strategy")
    if isinstance(strategy, str) and "spawn" in strategy:
        raise UserError(f"trainer.strategy {strategy} cannot hand this run to its processes; set it to ddp")


def check_callbacks(callbacks: Any) -> None:  # noqa: ANN401 - jsonargparse's namespaces
    """Refuse Lightning's callbacks that copy or change all weights of a task, nearly all of which are frozen.

    Args:
        callbacks: value of ``trainer.callbacks``: one, several or none.

    Raises:
        UserError: naming the first one, and what to do in its place.
    """
    for callback in callbacks if isinstance(callbacks, list) else filter(None, [callbacks]):
        module, _, name = callback.class_path.rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        for kind, (fault, way_out) in _CALLBACKS_OF_ALL_WEIGHTS.items():
            if isinstance(cls, type) and issubclass(cls, kind):
                raise UserError(f"trainer.callbacks has {name}, which {fault}; remove it{way_out}")


def check_precision(task: type, precision: str) -> None:
    """Refuse Lightning's true half and double precision, which would change the frozen models under the tokens.

    Raises:
        UserError: naming the precision to use in its place.
    """
    if not issubclass(task, TokenTask | TaskWrapper) or precision not in ("bf16-true", "16-true", "64-true", "64"):
        return
    instead = {"bf16-true": ("bf16-mixed", "bfloat16"), "16-true": ("16-mixed", "float16")}.get(precision)
    way_out = (
        f"set trainer.precision to {instead[0]}, and model.backbone.dtype to {instead[1]} for less memory"
        if instead
        else "set trainer.precision to 32-true"
    )
    raise UserError(f"trainer.precision {precision} is not possible, because tokens stay in float32; {way_out}")
