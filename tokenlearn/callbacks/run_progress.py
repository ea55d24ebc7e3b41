"""Progress of a run: of all steps of a fit, and of the batches of validations, tests and predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from torch import nn
from torch.utils.hooks import RemovableHandle

from tokenlearn.data.interfaces import TaskWrapper
from tokenlearn.progress import Meter


class RunProgress(ProgressBar):
    """Show how far a run is, see :class:`tokenlearn.progress.Meter`.

    A sheet of images can be one batch of many minutes, so evaluations of the network are counted within batches.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._meters: list[Meter] = []
        self._hook: RemovableHandle | None = None

    def disable(self) -> None:
        """Show nothing, as in all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self._enabled = True

    @property
    def is_enabled(self) -> bool:
        """Whether anything is shown, which the module's ``print`` asks for."""
        return self._enabled

    def print(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - arguments of the built-in function
        """Print a line above the bars."""
        from tqdm import tqdm  # type: ignore[import-untyped]

        tqdm.write(" ".join(map(str, args)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count the steps of the whole fit."""
        total = trainer.max_steps if trainer.max_steps >= 0 else trainer.estimated_stepping_batches
        self._begin("Training", _known(total), "step", pl_module, done=trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:  # noqa: ANN401 - no argument is used
        """Count the steps, beside figures of the step; LearningCurve prints those of validations."""
        figures = {name: value for name, value in trainer.progress_bar_metrics.items() if not name.startswith("val/")}
        meter = self._meters[-1]
        meter.update(
            trainer.global_step - meter.done, ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End."""
        self._end()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count batches."""
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._begin("Validation", _sum(batches), "batch", pl_module)

    def on_validation_batch_end(self, *args: Any) -> None:  # noqa: ANN401 - no argument is used
        """Count a batch."""
        self._meters[-1].update()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End."""
        self._end()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count batches."""
        self._begin("Test", _sum(trainer.num_test_batches), "batch", pl_module)

    def on_test_batch_end(self, *args: Any) -> None:  # noqa: ANN401 - no argument is used
        """Count a batch."""
        self._meters[-1].update()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End."""
        self._end()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count batches."""
        self._begin("Prediction", _sum(trainer.num_predict_batches), "batch", pl_module)

    def on_predict_batch_end(self, *args: Any) -> None:  # noqa: ANN401 - no argument is used
        """Count a batch."""
        self._meters[-1].update()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End."""
        self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the bars, so that the message stands alone."""
        while self._meters:
            self._end()

    def _begin(self, name: str, total: int | None, unit: str, module: L.LightningModule, done: int = 0) -> None:
        self._meters.append(Meter(name, total, unit=unit, done=done, shown=self._enabled))
        task = module.wrapped_task() if isinstance(module, TaskWrapper) else module
        backbone = getattr(task, "backbone", None)
        if self._hook is None and isinstance(backbone, nn.Module):
            self._hook = backbone.register_forward_hook(self._beat)

    def _beat(self, *args: object) -> None:
        if self._meters:
            self._meters[-1].beat("network evaluation")

    def _end(self) -> None:
        if self._meters:
            self._meters.pop().close()
        if not self._meters and self._hook is not None:
            self._hook.remove()
            self._hook = None


def _known(number: float) -> int | None:
    return int(number) if math.isfinite(number) else None


def _sum(batches: Sequence[float] | float) -> int | None:
    return _known(sum(batches) if isinstance(batches, Sequence) else batches)
