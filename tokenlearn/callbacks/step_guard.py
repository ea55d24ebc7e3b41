"""A signal stops a run between steps."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tokenlearn.stopping import StopSignals


class StepGuard(Checkpoint):
    """Tell the signal handler when steps run, and stop predictions between batches, as the trainer stops a fit.

    The trainer calls callbacks of this base class last, so the files of a batch are written when it stops the run.

    Args:
        signals: handler of the signals.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Steps begin."""
        self.signals.in_steps = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Steps are over."""
        self.signals.in_steps = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Steps begin, except in a sanity check, from which nothing is worth waiting for."""
        self.signals.in_steps = not trainer.sanity_checking

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Steps are over, unless the validation is within a fit."""
        self.signals.in_steps = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Steps begin."""
        self.signals.in_steps = True

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Steps are over."""
        self.signals.in_steps = False

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Steps begin."""
        self.signals.in_steps = True

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's hook
        batch: Any,  # noqa: ANN401 - Lightning's hook
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop here if a signal came."""
        if trainer.received_sigterm:
            raise SIGTERMException

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Steps are over."""
        self.signals.in_steps = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Steps are over."""
        self.signals.in_steps = False
