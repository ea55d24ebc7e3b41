"""One warning of the images that all processes of a run have skipped."""

from __future__ import annotations

from typing import Any

import lightning as L

from tokenlearn.data.streams import EvaluationBatches, warn_of
from tokenlearn.processes import of_all_processes


class SkippedImages(L.Callback):
    """Warn in the first process of the images that each process has skipped in its part of a validation or test.

    A single process has warned already.
    """

    @classmethod
    def for_run(cls, trainer: L.Trainer | None) -> list[L.Callback]:
        """The callback for a run that lacks it: a fit and the test after it share one; None is no run yet."""
        there = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
        return [] if any(isinstance(callback, cls) for callback in there) else [cls()]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn of images of the validation."""
        _warn(trainer, trainer.val_dataloaders)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn of images of the test."""
        _warn(trainer, trainer.test_dataloaders)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn of images to edit."""
        _warn(trainer, trainer.predict_dataloaders)


def _warn(trainer: L.Trainer, loaders: Any) -> None:  # noqa: ANN401 - one data loader, several or none
    if trainer.world_size == 1:
        return
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    own = [skipped for loader in loaders if isinstance(loader, EvaluationBatches) for skipped in loader.skipped]
    of_all = of_all_processes(own)
    if trainer.is_global_zero:
        warn_of([skipped for part in of_all for skipped in part])
