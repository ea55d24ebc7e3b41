"""Embedding files of the best tokens so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from tokenlearn.methods.base import TokenTask
from tokenlearn.tokens import EmbeddingFormat, embedding_file_name, save_embedding


class EmbeddingExport(L.Callback):
    """Write every token's embedding file to ``embeddings/`` of the run folder whenever a metric improves.

    Args:
        monitor: logged metric that decides.
        mode: whether it should grow or shrink.
        format: form of the files, see :func:`tokenlearn.tokens.save_embedding`.

    Attributes:
        best: best value so far, None before the first.
    """

    def __init__(
        self,
        monitor: str = "val/guided_accuracy",
        mode: Literal["max", "min"] = "max",
        format: EmbeddingFormat = "a1111",
    ) -> None:
        self.monitor, self.mode, self.format = monitor, mode, format
        self.best: float | None = None
        self.paths: list[Path] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export if the metric improved on the best so far."""
        if trainer.sanity_checking or not trainer.fitting or not isinstance(pl_module, TokenTask):  # type: ignore[attr-defined]
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            return
        if self.best is None or (value > self.best if self.mode == "max" else value < self.best):
            self.best = float(value)
            self.export(trainer, pl_module, {"step": str(trainer.global_step)})

    @rank_zero_only
    def export(self, trainer: L.Trainer, task: TokenTask, metadata: dict[str, str]) -> None:
        """Write the files of all tokens of the task's bank."""
        assert task.bank is not None
        folder = Path(trainer.default_root_dir) / "embeddings"
        about = task.token_metadata()
        self.paths = [
            save_embedding(
                folder / embedding_file_name(token), token, task.bank.get(token), about[token] | metadata, self.format
            )
            for token in task.bank.placeholders
        ]

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After a fit, write the files again, with what the judge said of the tokens that were kept."""
        if self.paths and isinstance(pl_module, TokenTask):
            self.export(trainer, pl_module, {})

    def state_dict(self) -> dict[str, Any]:
        """The best value, so that a resumed run does not export worse tokens."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best value."""
        self.best = state_dict["best"]
