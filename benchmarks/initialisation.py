"""Training steps of attributes from each start of their tokens: ``uv run python benchmarks/initialisation.py``.

For each attribute, initialiser and seed, one training runs as in ``tokenlearn fit``, with the settings of a config but
with one attribute alone. Every few steps, and before the first step, each token edits every held-out image that needs
the edit in one step. The training stops when the guide classifies a given share of the edits as the class
(``val/guided_accuracy``), and its optimizer steps are counted. The count is a multiple of the steps between checks,
and 0 for tokens that reach the share before any training. A training that never reaches the share counts in full. The
default attributes are two whose one-step edits pass 90 % under the bundled config. Others, such as smiles, stay near
80 % from every start, because the preservation loss holds them back.

``default_over_word`` is the median count over attributes and seeds of the config's initialiser, over the median count
of ``words``; null if only the latter is 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from statistics import median
from typing import Any, get_args

import lightning as L
from jsonargparse import Namespace, auto_cli
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.common import fit_quietly, parse_config
from tokenlearn.errors import UserError
from tokenlearn.tokens import ClassInitialiser

_ROUNDING = 1e-6  # of accuracies, which are logged as float32


class StopAtAccuracy(L.Callback):
    """Stops the training at the first validation whose ``val/guided_accuracy`` is high enough.

    Args:
        accuracy: lowest accuracy that is enough, from 0 to 1.

    Attributes:
        steps: optimizer steps until then; None if no validation reached the accuracy.
    """

    def __init__(self, accuracy: float) -> None:
        self.accuracy = accuracy
        self.steps: int | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the accuracy, also before the first step, which Lightning calls a sanity check."""
        if self.steps is None and float(trainer.callback_metrics["val/guided_accuracy"]) >= self.accuracy - _ROUNDING:
            self.steps = trainer.global_step
            trainer.should_stop = True


def steps_to_accuracy(
    settings: Namespace, changes: Mapping[str, Any], seed: int, accuracy: float, max_steps: int, check_every: int
) -> int | None:
    """Optimizer steps that a training takes to reach an accuracy.

    Args:
        settings: settings of the config.
        changes: key to value of settings that differ from the config.
        seed: seed of everything that is random.
        accuracy: accuracy at which the training stops.
        max_steps: most steps of the training.
        check_every: steps between validations.

    Returns:
        A multiple of ``check_every``; None if no validation reached the accuracy.
    """
    stop = StopAtAccuracy(accuracy)
    fit_quietly(settings, {**changes, "model.init_args.seed": seed}, seed, stop, max_steps, check_every)
    return stop.steps


def ratio(steps: float, word_steps: float) -> float | None:
    """Steps over the steps from the word; None if only the latter are 0."""
    if word_steps:
        return round(steps / word_steps, 4)
    return 1.0 if steps == word_steps else None


def main(
    fit_config: str = "configs/portraits/caso.yaml",
    attributes: tuple[str, ...] = ("female", "glasses"),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    accuracy: float = 0.9,
    max_steps: int = 60,
    check_every: int = 2,
    images: int = 32,
    batch_size: int = 16,
) -> None:
    """Train, print a table, and as the last line the medians and their ratio as JSON.

    Args:
        fit_config: config of a training with :class:`tokenlearn.training.Caso`; its initialiser is the default.
        attributes: attributes to learn, each alone.
        seeds: seeds of the random choices in training, and of the order of images.
        accuracy: share of the edits at which a training stops, from 0 to 1.
        max_steps: optimizer steps of the longest training.
        check_every: optimizer steps between checks.
        images: held-out images of a check.
        batch_size: images per step.

    Raises:
        UserError: if a number is out of range, or there is nothing to train or to check.
    """
    if not 0 <= accuracy <= 1:
        raise UserError(f"accuracy must be from 0 to 1, got {accuracy}")
    counts_of = {"attributes": len(attributes), "seeds": len(seeds), "images": images, "check_every": check_every}
    for name, number in counts_of.items():
        if number < 1:
            raise UserError(f"{name} must be at least 1, got {number}")

    settings = parse_config(fit_config)
    known, default = settings["model.init_args.attributes"], settings["model.init_args.initialisation.kind"]
    initialisers: tuple[ClassInitialiser, ...] = get_args(ClassInitialiser)
    runs = [(attribute, initialiser) for attribute in attributes for initialiser in initialisers]
    steps: dict[tuple[str, ClassInitialiser], list[int | None]] = {run: [] for run in runs}
    with tqdm(total=len(runs) * len(seeds), desc="Trainings", unit="training") as bar:
        for attribute, initialiser in runs:
            changes = {
                "model.init_args.attributes": {attribute: known.get(attribute)},
                "model.init_args.initialisation.kind": initialiser,
                "model.init_args.judge": None,
                "data.init_args.batch_size": batch_size,
                "data.init_args.held_out.validation": images,
            }
            for seed in seeds:
                reached = steps_to_accuracy(settings, changes, seed, accuracy, max_steps, check_every)
                steps[attribute, initialiser].append(reached)
                bar.update()

    print(f"{fit_config}, optimizer steps until the guide sees the class in {accuracy:.0%} of the edits")
    line = "{:<16} {:<12}" + " {:>8}" * (len(seeds) + 1)
    print(line.format("attribute", "starts from", *(f"seed {seed}" for seed in seeds), "median"))
    counted = {run: [max_steps if count is None else count for count in counts] for run, counts in steps.items()}
    for (attribute, initialiser), counts in steps.items():
        cells = [f"{max_steps}*" if count is None else str(count) for count in counts]
        print(line.format(attribute, initialiser, *cells, f"{median(counted[attribute, initialiser]):g}"))
    print(f"* not reached in {max_steps} steps, which are counted; checked every {check_every}, default '{default}'")

    medians: dict[str, float] = {}
    unreached: dict[str, int] = {}
    for start in initialisers:
        medians[start] = median(count for attribute in attributes for count in counted[attribute, start])
        unreached[f"unreached_{start}"] = sum(steps[attribute, start].count(None) for attribute in attributes)
    results: dict[str, Any] = {"default_over_word": ratio(medians[default], medians["words"]), "default": default}
    results |= {f"steps_{name}": count for name, count in medians.items()}
    print(json.dumps(results | unreached))


if __name__ == "__main__":
    auto_cli(main)
