"""The checkpoint of the last step, from which a fit continues as if it had never stopped."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tokenlearn.errors import check_at_least
from tokenlearn.files import atomic_write
from tokenlearn.notices import notice

LAST = "last.ckpt"


class LastCheckpoint(Checkpoint):
    """Write ``last.ckpt`` beside the best checkpoints: after validations and epochs, in between, and at a signal.

    A fit that continues from it, in the same or in a new folder, takes over the best checkpoints so far, and ends with
    the tokens of a fit that was never interrupted.

    Args:
        every_n_minutes: minutes that a killed process loses at most; 0 writes the file after every step.

    Attributes:
        path: the file, None before it is first written.
        step: steps of the file.

    Raises:
        UserError: if the number of minutes is negative.
    """

    def __init__(self, every_n_minutes: float = 1.0) -> None:
        check_at_least("last_checkpoint", 0, every_n_minutes=every_n_minutes)
        self.every_n_minutes = every_n_minutes
        self.path: str | None = None
        self.step = 0
        self._written = 0.0
        self._batch: int | None = None  # that the file is of
        self._accumulates = False
        self._repeats_validation = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._written, self._batch, self._accumulates = time.monotonic(), None, False

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's hook
        batch: Any,  # noqa: ANN401 - Lightning's hook
        batch_idx: int,
    ) -> None:
        """Write the file if it is time."""
        # Gradients that are still added up are in no checkpoint.
        batches = trainer.accumulate_grad_batches
        self._accumulates = (batch_idx + 1) % batches != 0 and not trainer.is_last_batch
        # A signal between two optimizer steps finds no moment to save, so the last one must be saved.
        last_step = 0 <= trainer.max_steps <= trainer.global_step  # within an epoch, whose end would not be whole
        due = batches > 1 or last_step or time.monotonic() - self._written >= 60 * self.every_n_minutes
        if trainer.strategy.broadcast(due) and not _validation_may_follow(trainer, batch_idx):
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file after a validation within an epoch; callbacks that keep the best are done by then."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file after an epoch and its validation."""
        if self._batch != trainer.fit_loop.total_batch_idx:
            self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write the file when a signal stops the fit between steps.

        A signal within a validation leaves a checkpoint from before it. Nothing is written where the steps are over
        and only the validation is left, because a fit without steps left does not validate: it repeats the last steps.
        """
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not isinstance(exception, SIGTERMException) or not fitting:
            return
        if self._batch == trainer.fit_loop.total_batch_idx:
            return
        self._repeats_validation = trainer.validating
        if not (self._repeats_validation and 0 <= trainer.max_steps <= trainer.global_step):
            self._save(trainer)
        self._repeats_validation = False

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the trainer begin an interrupted validation again, of which no figures are in the checkpoint."""
        if self._repeats_validation:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            done = progress["total"]["completed"]
            progress["total"] = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
            progress["current"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress["is_last_batch"] = False

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Bring the last and the best checkpoints into this run's folder; Lightning forgets them in another folder."""
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or callback.dirpath is None:
                continue
            local = "://" not in str(callback.dirpath)
            copies = trainer.state.fn == TrainerFn.FITTING and trainer.is_global_zero and local
            resumed_from, folder = Path(str(trainer.ckpt_path)), Path(callback.dirpath)
            if copies and resumed_from.is_file() and not (folder / LAST).is_file():
                _copy(resumed_from, folder / LAST)  # a fit without steps left writes none
            state = checkpoint["callbacks"].get(callback.state_key)
            if state is None:  # another figure chose the best tokens
                continue
            if copies:
                state = _moved(state, folder, resumed_from.parent)
            checkpoint["callbacks"][callback.state_key] = trainer.strategy.broadcast(state) | {
                "dirpath": callback.dirpath
            }

    def _save(self, trainer: L.Trainer) -> None:
        if self._accumulates or not trainer.global_step or trainer.fast_dev_run:  # type: ignore[attr-defined] # set by the trainer's connector
            return
        folders = [
            callback.dirpath
            for callback in trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint) and callback.dirpath
        ]
        self.path = f"{folders[0] if folders else f'{trainer.default_root_dir}/checkpoints'}/{LAST}"
        trainer.save_checkpoint(self.path)
        self.step = trainer.global_step
        self._written, self._batch = time.monotonic(), trainer.fit_loop.total_batch_idx


def _validation_may_follow(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a validation may follow this batch: the trainer skips it when it resumes from the batch's checkpoint."""
    interval = trainer.val_check_batch
    if trainer.is_last_batch or interval is None:
        return True
    return (batch_idx + 1) % interval == 0 or (trainer.fit_loop.total_batch_idx + 1) % interval == 0


def _copy(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all."""
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)


def _moved(state: dict[str, Any], folder: Path, resumed_from: Path) -> dict[str, Any]:
    """The state of a ModelCheckpoint with its checkpoints copied to another folder.

    Args:
        state: the state.
        folder: the other folder.
        resumed_from: folder of the checkpoint that the run continues from, in case both have been moved together.
    """
    moved: dict[str, str] = {}
    for path in dict.fromkeys([*state["best_k_models"], state["best_model_path"]]):
        target = folder / Path(path).name
        for source in (resumed_from / target.name, Path(path)):
            if path and source.is_file():
                if source.resolve() != target.resolve():
                    _copy(source, target)
                moved[path] = str(target)
                break
        else:
            if path:
                notice(
                    f"the best checkpoint so far, '{path}', is gone, so only later ones are compared; put it back and "
                    "continue again to compare it too"
                )
    best = moved.get(state["best_model_path"], "")
    return state | {
        "best_model_path": best,
        "best_model_score": state["best_model_score"] if best else None,
        "best_k_models": {moved[path]: score for path, score in state["best_k_models"].items() if path in moved},
        "kth_best_model_path": moved.get(state["kth_best_model_path"], ""),
    }
