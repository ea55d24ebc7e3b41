"""Embedding files of the best tokens so far."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from tokenlearn.callbacks.images import to_image
from tokenlearn.data.interfaces import TaskWrapper
from tokenlearn.errors import UserError
from tokenlearn.token_task import OF_TASK, TokenTask
from tokenlearn.tokens import EmbeddingFormat, LearnedTokens, load_embedding
from tokenlearn.tokens.files.previews import copy_previews, write_preview
from tokenlearn.tokens.files.programs import how_to_use

EMBEDDINGS = "embeddings"
"""Folder of the files, below the run folder."""
_SECTION = "embedding_export"
"""Section of the settings."""
_SHOW_PREVIEWS = ("a1111", "comfyui")
"""Formats of programs that show an image beside an embedding file."""
_FIGURE_OF_OLD_CHECKPOINTS = "val/guided_accuracy"
"""Figure of the best value in checkpoints that do not name it."""


class EmbeddingExport(L.Callback):
    """Write every token's embedding file to ``embeddings/`` of the run folder whenever a metric improves.

    Args:
        monitor: logged metric that decides; ``task`` for the one by which the task chooses its best tokens.
        mode: whether it should grow or shrink; with ``task``, as the task says.
        format: form of the files, see :func:`tokenlearn.tokens.save_embedding`.
        previews: whether a token's first validation image is written beside its file, as ``NAME.preview.png``, where
            the programs that the format is for show it.

    Attributes:
        best: best value so far, None before the first.
        paths: files that this run wrote.
        usage: lines on what to type in each program, for the first of them.

    Raises:
        UserError: if the mode would export the worst tokens; at the first validation of a fit, if the metric is not
            logged.
    """

    def __init__(
        self,
        monitor: str = OF_TASK,
        mode: Literal["max", "min"] = "max",
        format: EmbeddingFormat = "a1111",
        previews: bool = True,
    ) -> None:
        self.monitor, self.mode, self.format, self.previews = monitor, mode, format, previews
        self.best: float | None = None
        self._best_of: str | None = None
        self.paths: list[Path] = []
        self.usage: list[str] = []
        self._fitted = False
        self._images: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a mode that would export the worst tokens, before they are trained."""
        if isinstance(pl_module, TokenTask):
            pl_module.watched(self.monitor, self.mode, _SECTION)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget earlier images."""
        self._images = {}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's hook
        batch: Any,  # noqa: ANN401 - Lightning's hook
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first image of each row, see :class:`tokenlearn.callbacks.ImageGrid`."""
        if self.previews and trainer.is_global_zero and isinstance(outputs, dict):
            for image, row in zip(outputs["images"], outputs["rows"], strict=True):
                self._images.setdefault(row, image)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the last tokens of a fit without validations; later tests and validations are of the best tokens."""
        self._fitted = True
        if not trainer.val_dataloaders:
            self._export_after_fit(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export if the metric improved on the best so far; after a fit, export the best tokens."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._export_after_fit(trainer, pl_module)
            return
        if trainer.sanity_checking or not isinstance(pl_module, TokenTask):
            return
        monitor, mode = pl_module.watched(self.monitor, self.mode, _SECTION)
        if monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise UserError(f"{_SECTION}.monitor '{monitor}' is not logged; set it to a figure that is: {logged}")
        if self._best_of not in (None, monitor):  # resumed, and values of two figures do not compare
            self.best = None
        self._best_of = monitor
        value = float(trainer.callback_metrics[monitor])
        better = self.best is None or (value > self.best if mode == "max" else value < self.best)
        if better and not math.isnan(value):  # no later value would compare as better than NaN
            self.best = value
            self.export(trainer, pl_module, {"step": str(trainer.global_step)})
        self._images = {}  # of tokens that are not the exported ones

    @rank_zero_only
    def export(self, trainer: L.Trainer, task: TokenTask, metadata: dict[str, str]) -> None:
        """Write the files of all tokens of the task's bank."""
        assert task.bank is not None
        about = {token: entries | metadata for token, entries in task.token_metadata().items()}
        self.paths = LearnedTokens(task.bank, about).save(Path(trainer.default_root_dir) / EMBEDDINGS, self.format)
        for path, token in zip(self.paths, task.bank.placeholders, strict=True):
            image = self._images.get(token, self._images.get(about[token].get("class", "")))
            if image is not None and self.format in _SHOW_PREVIEWS:
                write_preview(path, token, to_image(image))
        self.usage = how_to_use(load_embedding(self.paths[0]))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After a fit, write the files of the best tokens, with the judge's figures in their metadata."""
        self._export_after_fit(trainer, pl_module)

    def _export_after_fit(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the files of the best tokens; a resumed fit that never improved writes them here alone."""
        task = pl_module.wrapped_task() if isinstance(pl_module, TaskWrapper) else pl_module
        if self._fitted and isinstance(task, TokenTask):
            self.export(trainer, task, {})

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Bring previews of the best tokens so far into this run's folder: only a better validation makes others."""
        if trainer.state.fn == TrainerFn.FITTING and trainer.is_global_zero and self.previews:
            resumed_run = Path(str(trainer.ckpt_path)).parent.parent
            copy_previews(resumed_run / EMBEDDINGS, Path(trainer.default_root_dir) / EMBEDDINGS)

    def state_dict(self) -> dict[str, Any]:
        """The best value and its figure, so that a resumed run does not export worse tokens."""
        return {"best": self.best, "monitor": self._best_of}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best value and its figure."""
        self.best = state_dict["best"]
        self._best_of = state_dict.get("monitor", _FIGURE_OF_OLD_CHECKPOINTS)
