"""Class tokens by the gradient through all or the last steps: ``uv run python benchmarks/class_token_gradient.py``.

Each training runs as ``tokenlearn fit`` runs it, with the settings of a config except for the words that tokens start
from and the gradient: through the last K steps for several K, through all steps with checkpoints, or through all steps
of a reversible solver. Every few steps, and before the first one, images of held-out seeds are generated with the
tokens by the scheduler, and rated by the judge (``val/judged_accuracy``).

The table has a row per gradient: the judged accuracy at these steps, seconds per training step without validation, and
the accuracy gained between the first and the best check, per step and per second. The last line is the same as JSON,
by the name of the row.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, Literal, cast

import lightning as L
from jsonargparse import auto_cli
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.common import fit_quietly, parse_judged_config
from tokenlearn.diffusion import EDICT, OBELM, Checkpointed, LastK, Leapfrog, Reversible
from tokenlearn.errors import UserError

FullGradient = Literal["Checkpointed", "EDICT", "Leapfrog", "OBELM"]
_SOLVERS = {"EDICT": EDICT(), "Leapfrog": Leapfrog(), "OBELM": OBELM()}


class AccuracyOverTime(L.Callback):
    """Judged accuracies of a training, and the time until each.

    Attributes:
        checks: optimizer steps, seconds of training and judged accuracy of each validation.
    """

    def __init__(self) -> None:
        self.checks: list[tuple[int, float, float]] = []
        self._seconds = self._started = 0.0

    def on_train_batch_start(self, *args: Any) -> None:  # noqa: ANN401 - no argument is used
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        *args: Any,  # noqa: ANN401 - no argument is used
    ) -> None:
        """Stop the clock when the device has finished the step."""
        cast(Mapping[str, Tensor], outputs)["loss"].item()
        self._seconds += time.perf_counter() - self._started

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add a check, also before the first step, where Lightning calls it a sanity check."""
        self.checks.append((trainer.global_step, self._seconds, self._judged(trainer)))

    def _judged(self, trainer: L.Trainer) -> float:
        return float(trainer.callback_metrics["val/judged_accuracy"])


def gradients(
    last_k: tuple[int, ...], full: tuple[FullGradient, ...], checkpointing: bool
) -> dict[str, dict[str, Any]]:
    """Name of each row to the settings of its training."""
    rows: dict[str, dict[str, Any]] = {
        f"last {steps}": {"gradient": LastK(steps, checkpointing), "solver": None} for steps in last_k
    }
    for name in full:
        solver = _SOLVERS.get(name)
        rows[name] = {"gradient": Checkpointed() if solver is None else Reversible(), "solver": solver}
    return rows


def figures(checks: list[tuple[int, float, float]]) -> dict[str, Any]:
    """Figures of a row.

    Args:
        checks: see :class:`AccuracyOverTime`.
    """
    (_, _, first), *later = checks
    best_step, best_seconds, best = max(later, key=lambda check: check[2])  # the first of equal checks
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
    full: tuple[FullGradient, ...] = ("Checkpointed", "Leapfrog"),
    max_steps: int = 20,
    check_every: int = 5,
    images: int = 8,
    initial_words: str = "a",
    checkpointing: bool = False,
    seed: int = 0,
) -> None:
    """Train, print the table, and its figures as JSON.

    Args:
        fit_config: config of a training with :class:`tokenlearn.training.ClassTokens` and a judge.
        last_k: numbers of differentiated last steps, one training each.
        full: gradients through all steps, one training each: with checkpoints, or of a reversible solver.
        max_steps: optimizer steps.
        check_every: optimizer steps between checks.
        images: images of each class in a check.
        initial_words: words that tokens start from; the default knows nothing of a class, so there is all to learn.
        checkpointing: recompute the activations of the last steps in the backward pass.
        seed: seed of everything that is random.

    Raises:
        UserError: if a number is out of range, or the config has no judge.
    """
    if not 1 <= check_every <= max_steps:
        raise UserError(f"check_every must be from 1 to max_steps {max_steps}, got {check_every}")
    settings = parse_judged_config(fit_config)
    found: dict[str, dict[str, Any]] = {}
    for name, changes in tqdm(gradients(last_k, full, checkpointing).items(), desc="Trainings", unit="training"):
        progress = AccuracyOverTime()
        changed = {f"model.init_args.{setting}": value for setting, value in changes.items()} | {
            "model.init_args.tokens.initial_words": initial_words,
            "data.init_args.validation_images": images,
        }
        fit_quietly(settings, changed, seed, progress, max_steps, check_every)
        found[name] = figures(progress.checks)

    steps = list(next(iter(found.values()))["accuracy"])
    line = "{:<14}" + " {:>8}" * len(steps) + " {:>10} {:>10} {:>12}"
    print(f"{fit_config}, judged accuracy after steps of training")
    print(line.format("gradient", *(f"step {step}" for step in steps), "s / step", "gain/step", "gain/second"))
    for name, row in found.items():
        accuracies = [f"{accuracy:.1%}" for accuracy in row["accuracy"].values()]
        gains = [f"{row['gain_per_step']:.2%}", f"{row['gain_per_second']:.3%}"]
        print(line.format(name, *accuracies, f"{row['seconds_per_step']:.2f}", *gains))
    print(json.dumps(found))


if __name__ == "__main__":
    auto_cli(main)
