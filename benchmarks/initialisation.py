"""Where tokens of attributes should start: ``uv run python benchmarks/initialisation.py``.

For each attribute, initialiser and seed, a training as ``tokenlearn fit`` runs it, with the settings of a config but
for that one attribute. Every few steps, from before the first one on, every held-out picture that needs the edit is
edited in one step by each token, and the training stops where the guide takes the wanted share of them for the class
(``val/guided_accuracy``): the optimizer steps until then count. The count is a multiple of the steps between checks,
and 0 for tokens that are there before any training. Where the training ends before, its full length counts. The
default attributes are two whose one-step edits pass 90 % under the bundled config: those of others, such as smiles,
stay near 80 % from whichever start, as preservation holds them back.

``default_over_word`` is the median over attributes and seeds of the config's initialiser over that of ``words``, null
if only the latter is 0.
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
        accuracy: from 0 to 1.

    Attributes:
        steps: optimizer steps until then; None if it was never reached.
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
    """Optimizer steps that a training takes.

    Args:
        settings: of its config.
        changes: key to value that is another in this training.
        seed: of everything that is random.
        accuracy: where it stops.
        max_steps: where it stops in any case.
        check_every: steps between validations.

    Returns:
        A multiple of ``check_every``; None if the accuracy was at no validation high enough.
    """
    stop = StopAtAccuracy(accuracy)
    fit_quietly(settings, {**changes, "model.init_args.seed": seed}, seed, stop, max_steps, check_every)
    return stop.steps


def ratio(steps: float, of_word: float) -> float | None:
    """Steps over those from the word, null where the latter are 0 and the former are not."""
    if of_word:
        return round(steps / of_word, 4)
    return 1.0 if steps == of_word else None


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
        fit_config: config of a training with :class:`tokenlearn.methods.Caso`; its initialiser is the default.
        attributes: attributes to learn, each alone.
        seeds: of what is drawn in training, and of the order of pictures.
        accuracy: wanted share of the edits, from 0 to 1.
        max_steps: optimizer steps of the longest training.
        check_every: optimizer steps between checks.
        images: held-out pictures of a check.
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
    known, default = settings["model.init_args.attributes"], settings["model.init_args.initialiser"]
    initialisers: tuple[ClassInitialiser, ...] = get_args(ClassInitialiser)
    runs = [(attribute, initialiser) for attribute in attributes for initialiser in initialisers]
    steps: dict[tuple[str, ClassInitialiser], list[int | None]] = {run: [] for run in runs}
    with tqdm(total=len(runs) * len(seeds), desc="Trainings", unit="training") as bar:
        for attribute, initialiser in runs:
            changes = {
                "model.init_args.attributes": {attribute: known.get(attribute)},
                "model.init_args.initialiser": initialiser,
                "model.init_args.judge": None,
                "data.init_args.batch_size": batch_size,
                "data.init_args.held_out.validation": images,
            }
            for seed in seeds:
                reached = steps_to_accuracy(settings, changes, seed, accuracy, max_steps, check_every)
                steps[attribute, initialiser].append(reached)
                bar.update()

    print(f"{fit_config}, optimizer steps until {accuracy:.0%} of the edits are what the guide takes for the class")
    line = "{:<16} {:<12}" + " {:>8}" * (len(seeds) + 1)
    print(line.format("attribute", "starts from", *(f"seed {seed}" for seed in seeds), "median"))
    counted = {run: [max_steps if count is None else count for count in counts] for run, counts in steps.items()}
    for (attribute, initialiser), counts in steps.items():
        shown = [f"{max_steps}*" if count is None else str(count) for count in counts]
        print(line.format(attribute, initialiser, *shown, f"{median(counted[attribute, initialiser]):g}"))
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
