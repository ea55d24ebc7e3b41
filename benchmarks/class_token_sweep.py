"""What learns class tokens from "a": gradients at equal CPU time: ``uv run python benchmarks/class_token_sweep.py``.

Each variant is a training as ``tokenlearn fit`` runs it, with the settings of a config except for those that its name
stands for, until it has used so many CPU seconds: the clock counts all cores, and training alone. Its learning rate
falls as a cosine of the seconds, so that a slow variant is not cut off at its start. Images of held-out seeds, the
same for all, are judged before the first step, and at a third, two thirds and the end of the time.

A variant that is done is a row of the CSV file. The same command continues, and skips rows with the same settings. The
table has a row per variant, with means over training seeds. The last line is the rows as JSON.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace, auto_cli
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.common import fit_quietly, parse_judged_config
from tokenlearn.data.latent_cache import json_hash
from tokenlearn.diffusion import Detached, LastK, OneStep
from tokenlearn.errors import UserError
from tokenlearn.files import atomic_write

SEED_SPACING = 1_000_000
"""Training images between the first ones of two seeds."""

MOMENTS = ("step 0", "1/3", "2/3", "end")
_COLUMNS = ["variant", "seed", *MOMENTS, "steps", "cpu_seconds", "settings"]
_MOST_STEPS = 1_000_000  # the time ends a training before

_MODEL, _DATA = "model.init_args.", "data.init_args."
_RATE = f"{_MODEL}optimizer.init_args.lr"

VARIANTS: dict[str, dict[str, Any]] = {
    "config": {},
    **{f"last {steps}": {f"{_MODEL}gradient": LastK(steps, checkpointing=False)} for steps in (1, 2, 4, 8, 16)},
    **{f"detached {steps}": {f"{_MODEL}gradient": Detached(steps, checkpointing=False)} for steps in (1, 2, 4, 8, 16)},
    **{
        f"one step {start:g} to {end:g}": {f"{_MODEL}gradient": OneStep(start, end)}
        for start, end in ((0.0, 0.3), (0.0, 0.5), (0.2, 0.7), (0.4, 0.9), (0.5, 1.0), (0.0, 1.0))
    },
    **{f"guidance {scale:g}": {f"{_MODEL}guidance": scale} for scale in (1.0, 3.0, 7.5)},
    **{f"learning rate {rate:g}": {_RATE: rate} for rate in (0.005, 0.01, 0.02, 0.04, 0.08)},
    **{f"batch {size}": {f"{_DATA}batch_size": size} for size in (3, 6, 12, 24)},
    "class mean": {f"{_MODEL}objective.init_args.form": "class_mean"},
}
"""Name to the settings that differ from the config."""


class OverTime(L.Callback):
    """Judge the tokens at shares of a time, anneal the learning rate, and stop at the end of the time.

    Args:
        seconds: CPU seconds of training.

    Attributes:
        accuracies: judged accuracy before the first step, and at each third of the time.
        steps: optimizer steps so far.
        used: CPU seconds of training so far.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.accuracies: list[float] = []
        self.steps = 0
        self.used = self._started = 0.0
        self._rates: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the learning rates of the settings."""
        self._rates = [float(group["lr"]) for group in trainer.optimizers[0].param_groups]

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:  # noqa: ANN401 - no argument is used
        """Set the learning rate, and start the clock."""
        left = (1 + math.cos(math.pi * min(1.0, self.used / self.seconds))) / 2
        for group, rate in zip(trainer.optimizers[0].param_groups, self._rates, strict=True):
            group["lr"] = left * rate
        self._started = time.process_time()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        *args: Any,  # noqa: ANN401 - no argument is used
    ) -> None:
        """Stop the clock, and have the tokens judged after a step in which a third of the time passed."""
        self.used += time.process_time() - self._started
        self.steps = trainer.global_step
        trainer.val_check_batch = 1 if self._moments_passed() > len(self.accuracies) else _MOST_STEPS

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the accuracy, also before the first step, where Lightning calls it a sanity check."""
        missing = self._moments_passed() - len(self.accuracies)  # a step may be longer than a third of the time
        self.accuracies += missing * [float(trainer.callback_metrics["val/judged_accuracy"])]
        trainer.should_stop = len(self.accuracies) == len(MOMENTS)

    def _moments_passed(self) -> int:
        return 1 + min(len(MOMENTS) - 1, int(self.used / self.seconds * (len(MOMENTS) - 1)))


def train(settings: Namespace, changes: Mapping[str, Any], seed: int, seconds: float) -> dict[str, Any]:
    """Train a variant, and give its row without its name and settings.

    Args:
        settings: settings of the config.
        changes: key to value of settings that differ.
        seed: training seed.
        seconds: CPU seconds of training.
    """
    clock = OverTime(seconds)
    first = {f"{_DATA}seed": seed * SEED_SPACING}
    fit_quietly(settings, {**changes, **first}, seed, clock, _MOST_STEPS, _MOST_STEPS)
    accuracies = {moment: f"{value:.4f}" for moment, value in zip(MOMENTS, clock.accuracies, strict=True)}
    return {"seed": str(seed), **accuracies, "steps": str(clock.steps), "cpu_seconds": f"{clock.used:.1f}"}


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of the CSV file; none before there is one.

    Raises:
        UserError: if the file has other columns.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != _COLUMNS:
            raise UserError(f"'{path}' has other columns than a sweep's; give another file in output_file")
        return list(reader)


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write the CSV file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Lines of the table: a row per variant, with means over its training seeds.

    Args:
        rows: rows of the CSV file.
    """
    lines = [f"| variant | seeds | {' | '.join(MOMENTS)} | steps |", f"| --- {'| --- ' * (len(MOMENTS) + 2)}|"]
    for name in dict.fromkeys(row["variant"] for row in rows):
        of_variant = [row for row in rows if row["variant"] == name]
        means = {
            column: sum(float(row[column]) for row in of_variant) / len(of_variant) for column in (*MOMENTS, "steps")
        }
        shares = " | ".join(f"{means[moment]:.0%}" for moment in MOMENTS)
        lines.append(f"| {name} | {len(of_variant)} | {shares} | {means['steps']:.0f} |")
    return lines


def main(
    fit_config: str = "configs/portraits/class_token.yaml",
    variants: tuple[str, ...] = tuple(VARIANTS),
    seconds: float = 600.0,
    seeds: tuple[int, ...] = (0,),
    images: int = 8,
    initial_words: str = "a",
    output_file: str = "outputs/class_token_sweep.csv",
) -> None:
    """Train the variants that are not in the CSV file yet, and print the table of all that were asked for.

    Args:
        fit_config: config of a training with :class:`tokenlearn.training.ClassTokens`, an optimizer and a judge.
        variants: names of :data:`VARIANTS`.
        seconds: CPU seconds of training of each.
        seeds: training seeds, from 0 to 99.
        images: images of each class in a check.
        initial_words: words that tokens start from; the default knows nothing of a class, so there is all to learn.
        output_file: CSV file with a row per variant and seed.

    Raises:
        UserError: for an unknown variant, a number that is out of range, or a config without a judge.
    """
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise UserError(f"there is no variant '{unknown[0]}'; choose among {', '.join(VARIANTS)}")
    if seconds <= 0 or not all(0 <= seed < 100 for seed in seeds):
        raise UserError(f"seconds must be above 0 and seeds from 0 to 99, got {seconds:g} and {list(seeds)}")
    settings = parse_judged_config(fit_config)
    common: dict[str, Any] = {
        f"{_MODEL}tokens.initial_words": initial_words,
        f"{_MODEL}lr_scheduler": None,
        f"{_DATA}validation_images": images,
        f"{_DATA}batches_per_epoch": _MOST_STEPS,
    }
    path = Path(output_file).expanduser()
    rows = read_rows(path)
    hashes = {
        name: json_hash(
            [settings.as_dict(), sorted((key, str(value)) for key, value in (common | changes).items()), seconds]
        )
        for name, changes in VARIANTS.items()
    }
    wanted = [(name, seed) for name in variants for seed in seeds]
    done = {(row["variant"], row["seed"], row["settings"]) for row in rows}
    missing = [(name, seed) for name, seed in wanted if (name, str(seed), hashes[name]) not in done]
    for name, seed in tqdm(missing, desc="Trainings", unit="training"):
        row = train(settings, common | VARIANTS[name], seed, seconds)
        rows = [*read_rows(path), {"variant": name, **row, "settings": hashes[name]}]
        write_rows(path, rows)
    asked = [
        row
        for name, seed in wanted
        for row in rows
        if (row["variant"], row["seed"], row["settings"]) == (name, str(seed), hashes[name])
    ]
    print(f"{fit_config}, judged accuracy in {seconds:g} CPU seconds of training from '{initial_words}'")
    print("\n".join(markdown(asked)))
    print(json.dumps(asked))


if __name__ == "__main__":
    auto_cli(main)
