"""Scores before the first step and at every validation, so that learning is seen as learning."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from tqdm import tqdm  # type: ignore[import-untyped]


class LearningCurve(L.Callback):
    """Validate before the first step of a fit, and print the scores of every validation on a line.

    A resumed fit has its first validation already.

    Args:
        validate_first: whether to validate before the first step.
    """

    def __init__(self, validate_first: bool = True) -> None:
        self.validate_first = validate_first

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate, as between steps."""
        if not self.validate_first or trainer.global_step > 0 or not trainer.enable_validation:
            return
        trainer.validating = True  # so that the trainer finds the loop that is running
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the scores of a validation within a fit."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or not trainer.is_global_zero:
            return
        if scores := validation_figures(trainer):
            listed = "  ".join(f"{name} {value:.3g}" for name, value in sorted(scores.items()))
            tqdm.write(f"step {trainer.global_step}: {listed}")


def validation_figures(trainer: L.Trainer) -> dict[str, float]:
    """The figures of the last validation by their names without ``val/``."""
    return {
        name.removeprefix("val/"): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("val/")
    }
