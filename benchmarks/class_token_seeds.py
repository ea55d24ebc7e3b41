"""Class tokens by several training seeds: ``uv run python benchmarks/class_token_seeds.py``.

Each seed is a fit as ``tokenlearn fit`` runs it, in a folder of its own: the seed is that of everything random, and
names the noise of the training images, which no two seeds share. The same test images judge all of them. The same
command continues where it was stopped, and trains no seed twice.

The table has a row per class: the mean judged accuracy of its tokens, the lowest, the 95 % Wilson interval of all
images together, and each seed. Below are the mean over classes with Student's 95 % interval over seeds, cut off at 0
and 100 %, and the minutes of each fit, with validation and test. The last line is the same as JSON.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import auto_cli

from tokenlearn.errors import UserError
from tokenlearn.files import atomic_write
from tokenlearn.main import main as tokenlearn
from tokenlearn.metrics import student_interval, wilson_interval
from tokenlearn.paths import resolve_config

SEED_SPACING = 10_000_000
"""Training images between the first ones of two seeds."""


class Judged(NamedTuple):
    """Judged images of a class's token.

    Attributes:
        correct: images of the class.
        images: all images.
    """

    correct: int
    images: int

    @property
    def share(self) -> float:
        """Judged accuracy."""
        return self.correct / self.images


def fit(fit_config: str, seed: int, folder: Path, options: Sequence[str]) -> None:
    """Fit, or continue a fit, unless its folder has the table that ends it.

    Args:
        fit_config: config of class tokens.
        seed: seed of everything random.
        folder: run folder.
        options: further options of ``tokenlearn fit``.
    """
    if (folder / "summary.json").is_file():
        return
    clock = folder.with_suffix(".json")
    before = float(json.loads(clock.read_text())) if clock.is_file() else 0.0
    started = time.monotonic()
    places = [f"--output_dir={folder}", "--ckpt_path=last"]
    seeds = [f"--seed_everything={seed}", f"--data.seed={seed * SEED_SPACING}"]
    try:
        tokenlearn(["fit", "--config", fit_config, "--data.test_kinds=[token]", *seeds, *options, *places])
    finally:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(clock) as temporary:
            temporary.write_text(json.dumps(round(before + time.monotonic() - started, 1)))


def judged_in(folder: Path) -> dict[str, Judged]:
    """Class to the judged images of its token in the table of a fit.

    Raises:
        UserError: if the judge's score is not a share of images.
    """
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and "token_images" not in rows[0]:
        raise UserError(
            f"the judge of '{folder}' has a score that is no share of images; set model.judge to a classifier"
        )
    return {
        row["class"]: Judged(round(float(row["token"]) * int(row["token_images"])), int(row["token_images"]))
        for row in rows
    }


def figures(tables: Mapping[int, Mapping[str, Judged]]) -> dict[str, Any]:
    """Figures over seeds.

    Args:
        tables: seed to class to judged images, the same classes for every seed.
    """
    classes = {}
    for name in next(iter(tables.values())):
        counts = [table[name] for table in tables.values()]
        shares = [count.share for count in counts]
        interval = wilson_interval(sum(count.correct for count in counts), sum(count.images for count in counts))
        classes[name] = {
            "mean": sum(shares) / len(shares),
            "lowest": min(shares),
            "interval": list(interval),
            "seeds": shares,
        }
    means = [sum(count.share for count in table.values()) / len(table) for table in tables.values()]
    return {
        "mean": sum(means) / len(means),
        # Student's ends may leave [0, 1], shares may not.
        "interval": [min(max(end, 0.0), 1.0) for end in student_interval(means)] if len(means) > 1 else None,
        "seeds": dict(zip(tables, means, strict=True)),
        "classes": classes,
    }


def check_options(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note the settings of the runs in a folder, and refuse a folder with runs of others.

    Raises:
        UserError: naming the folder.
    """
    noted = folder / "settings.json"
    if noted.is_file() and json.loads(noted.read_text()) != settings:
        raise UserError(f"output_dir '{folder}' has runs with another config or other options; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(noted) as temporary:
        temporary.write_text(json.dumps(settings, indent=2))


def main(
    fit_config: str = "portraits/class_token",
    seeds: tuple[int, ...] = (1, 2, 3),
    output_dir: str = "outputs/class_token_seeds",
    options: tuple[str, ...] = (),
) -> None:
    """Train by every seed, and print the table.

    Args:
        fit_config: config of a training with :class:`tokenlearn.training.ClassTokens` and a judge.
        seeds: training seeds, from 0 to 99.
        output_dir: folder of the run folders.
        options: further options of ``tokenlearn fit``, such as ``--model.tokens.initial_words=null``.

    Raises:
        UserError: if there are no seeds, one occurs twice or is out of range, or the folder has runs with other
            options.
    """
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 100 for seed in seeds):
        raise UserError(f"seeds must be different numbers from 0 to 99, at least one, got {list(seeds)}")
    folder = Path(output_dir).expanduser()
    check_options(folder, {"config": resolve_config(fit_config).read_text(), "options": list(options)})
    folders = {seed: folder / f"seed{seed}" for seed in seeds}
    for seed, run_folder in folders.items():
        fit(fit_config, seed, run_folder, options)
    found = figures({seed: judged_in(run_folder) for seed, run_folder in folders.items()})
    found["minutes"] = {
        seed: round(json.loads(run_folder.with_suffix(".json").read_text()) / 60, 2)
        for seed, run_folder in folders.items()
    }
    print_table(fit_config, found)
    print(json.dumps(found))


def print_table(fit_config: str, found: Mapping[str, Any]) -> None:
    """Print the figures of :func:`figures` with ``minutes``."""
    classes, minutes = found["classes"], found["minutes"]
    line = "{:<16} {:>7} {:>7} {:>14}" + " {:>7}" * len(minutes)
    print(f"{fit_config}, judged accuracy of tokens by {len(minutes)} training seeds")
    print(line.format("class", "mean", "lowest", "of all images", *(f"seed {seed}" for seed in minutes)))
    for name, row in classes.items():
        shares = [f"{share:.0%}" for share in row["seeds"]]
        low, high = row["interval"]
        print(line.format(name, f"{row['mean']:.1%}", f"{row['lowest']:.0%}", f"[{low:.0%}, {high:.0%}]", *shares))
    around = " [{:.1%}, {:.1%}] over seeds".format(*found["interval"]) if found["interval"] else ""
    print(f"mean {found['mean']:.1%}{around}; lowest class {min(row['mean'] for row in classes.values()):.1%}")
    print(f"minutes {', '.join(f'{value:g}' for value in minutes.values())}")


if __name__ == "__main__":
    auto_cli(main)
