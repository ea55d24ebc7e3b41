"""Settings of an optimizer and its schedule, and what a resumed fit does where they have changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tokenlearn.errors import UserError, reason_of

Settings = dict[str, dict[str, Any] | None]
"""``optimizer`` and ``lr_scheduler``, each as its class and settings; None for no schedule."""

_SECTIONS = ("optimizer", "lr_scheduler")
_PROGRESS = ("last_epoch", "base_lrs", "optimizer")  # of a scheduler; base_lrs repeats the optimizer's lr


def settings_of(optimizer: Optimizer, scheduler: LRScheduler | None) -> Settings:
    """Class and settings of a new optimizer and of its new schedule, as numbers and text alone."""
    group = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    return {
        "optimizer": {"class": type(optimizer).__name__} | _plain(group),
        "lr_scheduler": None if scheduler is None else _of_scheduler(scheduler),
    }


def changes(old: Settings, new: Settings) -> list[str]:
    """Each changed setting in words, such as ``model.optimizer.lr is 0.5, was 0.01``."""
    return [
        f"model.{section}{'' if name == 'class' else f'.{name}'} is {after}, was {before}"
        for section in _SECTIONS
        for name, before, after in _differences(old[section] or {"class": None}, new[section] or {"class": None})
    ]


def apply_changes(
    checkpoint: dict[str, Any], old: Settings, optimizer: Optimizer, scheduler: LRScheduler | None
) -> None:
    """Put the settings of a new optimizer and schedule into a checkpoint, as if they had held from the first step.

    Moments of the optimizer stay, unless it is of another class. The schedule is stepped to the checkpoint's step; one
    that waits for plateaus begins anew, since its figures so far are not known.

    Args:
        checkpoint: checkpoint of the trainer, which is changed.
        old: settings of the optimizer that wrote it.
        optimizer: new optimizer.
        scheduler: its new schedule.

    Raises:
        UserError: if the schedule is over before the checkpoint's step.
    """
    new = settings_of(optimizer, scheduler)
    steps: int = checkpoint["global_step"]
    if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a schedule that is stepped without its optimizer
            try:
                for _ in range(steps):
                    scheduler.step()
            except ValueError as error:
                raise UserError(
                    f"model.lr_scheduler is over before the checkpoint's step {steps} ({reason_of(error)}); make it "
                    "longer"
                ) from None
    fresh = optimizer.state_dict()
    assert new["optimizer"] is not None
    if old["optimizer"] is not None and old["optimizer"]["class"] == new["optimizer"]["class"]:
        (state,) = checkpoint["optimizer_states"]
        groups = zip(state["param_groups"], fresh["param_groups"], strict=True)
        fresh = state | {"param_groups": [group | {"params": saved["params"]} for saved, group in groups]}
    checkpoint["optimizer_states"] = [fresh]
    checkpoint["lr_schedulers"] = [] if scheduler is None else [scheduler.state_dict()]


def _of_scheduler(scheduler: LRScheduler) -> dict[str, Any]:
    parts = {
        f"part {number}": _of_scheduler(part) for number, part in enumerate(getattr(scheduler, "_schedulers", ()))
    }
    settings = {name: value for name, value in vars(scheduler).items() if name[0] != "_" and name not in _PROGRESS}
    return {"class": type(scheduler).__name__} | _plain(settings) | parts


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in settings.items()
        if _is_plain(value)
    }


def _is_plain(value: Any) -> bool:  # noqa: ANN401 - any setting
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of each setting that differs; of another class, the class alone."""
    if old["class"] != new["class"]:
        yield "class", old["class"], new["class"]
        return
    for name in new:
        if name != "initial_lr" and old.get(name) != new[name]:
            yield name, old.get(name), new[name]
