"""Class tokens by the gradient through all of sampling, or its end: ``uv run python benchmarks/class_token_chain.py``.

Trainings as ``tokenlearn fit`` runs them, with the settings of a config but for the words that tokens start from and
how the gradient goes through sampling: back through the last K steps for several K, or through the full chain,
checkpointed or invertible. Every few steps, from before the first one on, pictures of fresh seeds are drawn with the
tokens by the scheduler and judged by a classifier that trains nothing (``val/judged_accuracy``).

The table has a row for each way: the judged accuracy at these steps, seconds per training step without validation,
and the accuracy gained by the best of the checks over the first, per step and per second until it. The last line is
the same as JSON, by the name of the way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, cast

import lightning as L
from jsonargparse import Namespace, auto_cli
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.common import fit_quietly, parse_config
from tokenlearn.diffusion import GradientChain
from tokenlearn.errors import UserError


class AccuracyOverTime(L.Callback):
    """Notes what validations find, and how long was trained until then.

    Attributes:
        checks: optimizer steps, seconds of training and judged accuracy of each validation.
    """

    def __init__(self) -> None:
        self.checks: list[tuple[int, float, float]] = []
        self._seconds = self._started = 0.0

    def on_train_batch_start(self, *args: Any) -> None:  # noqa: ANN401 - nothing of it is used
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        *args: Any,  # noqa: ANN401 - as above
    ) -> None:
        """Stop the clock once the step is done on the device too."""
        cast(Mapping[str, Tensor], outputs)["loss"].item()
        self._seconds += time.perf_counter() - self._started

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take a note, also before the first step, which Lightning calls a sanity check."""
        accuracy = float(trainer.callback_metrics["val/judged_accuracy"])
        self.checks.append((trainer.global_step, self._seconds, accuracy))


def ways(last_k: tuple[int, ...], chains: tuple[GradientChain, ...]) -> dict[str, dict[str, Any]]:
    """What each training changes in the config, by the name of its row."""
    ends = {
        f"last {steps}": {"model.init_args.chain": "last_k", "model.init_args.gradient_steps": steps}
        for steps in last_k
    }
    return ends | {chain: {"model.init_args.chain": chain} for chain in chains}


def figures(checks: list[tuple[int, float, float]]) -> dict[str, Any]:
    """Figures of a row.

    Args:
        checks: see :class:`AccuracyOverTime`.
    """
    (_, _, first), *later = checks
    best_step, best_seconds, best = max(later, key=lambda check: check[2])  # the first of equal ones
    last_step, last_seconds, _ = later[-1]
    return {
        "accuracy": {step: round(accuracy, 4) for step, _, accuracy in checks},
        "seconds_per_step": round(last_seconds / last_step, 4),
        "gain_per_step": round((best - first) / best_step, 5),
        "gain_per_second": round((best - first) / best_seconds, 5),
    }


def main(
    fit_config: str = "configs/quickstart.yaml",
    last_k: tuple[int, ...] = (2, 8, 16),
    chains: tuple[GradientChain, ...] = ("checkpointed", "leapfrog"),
    max_steps: int = 20,
    check_every: int = 5,
    images: int = 8,
    initial_words: str = "a",
    seed: int = 0,
) -> None:
    """Train, print the table, and its figures as JSON.

    Args:
        fit_config: config of a training with :class:`tokenlearn.methods.ClassTokens` and a judge.
        last_k: numbers of last steps that are differentiated, each in a training of its own.
        chains: full chains, likewise.
        max_steps: optimizer steps.
        check_every: optimizer steps between checks.
        images: pictures of each class in a check.
        initial_words: what tokens start from; by default what knows no class, so that there is all to learn.
        seed: of everything that is random.

    Raises:
        UserError: if a number is out of range, or the config has no judge.
    """
    if not 1 <= check_every <= max_steps:
        raise UserError(f"check_every must be from 1 to max_steps {max_steps}, got {check_every}")
    settings: Namespace = parse_config(fit_config)
    if settings["model.init_args.judge"] is None:
        raise UserError(f"'{fit_config}' has no judge; set model.judge to a classifier that trains nothing")
    found: dict[str, dict[str, Any]] = {}
    for name, changes in tqdm(ways(last_k, chains).items(), desc="Trainings", unit="training"):
        progress = AccuracyOverTime()
        changed = {
            **changes,
            "model.init_args.initial_words": initial_words,
            "data.init_args.validation_images": images,
        }
        fit_quietly(settings, changed, seed, progress, max_steps, check_every)
        found[name] = figures(progress.checks)

    steps = list(next(iter(found.values()))["accuracy"])
    line = "{:<14}" + " {:>8}" * len(steps) + " {:>10} {:>10} {:>12}"
    print(f"{fit_config}, judged accuracy after steps of training")
    print(line.format("gradient", *(f"step {step}" for step in steps), "s / step", "gain/step", "gain/second"))
    for name, own in found.items():
        accuracies = [f"{accuracy:.1%}" for accuracy in own["accuracy"].values()]
        gains = [f"{own['gain_per_step']:.2%}", f"{own['gain_per_second']:.3%}"]
        print(line.format(name, *accuracies, f"{own['seconds_per_step']:.2f}", *gains))
    print(json.dumps(found))


if __name__ == "__main__":
    auto_cli(main)
