"""A sheet of validation images, each validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from tokenlearn.callbacks.images import save_image, sheet, to_image
from tokenlearn.errors import check_at_least

VALIDATION = "validation"
FINAL_SHEET = f"{VALIDATION}/final.png"
"""Sheet of a validation apart from training, below the run folder."""


class ImageGrid(L.Callback):
    """Write validation images to ``validation/`` of the run folder and to TensorBoard, a row per class.

    A validation during a fit writes ``step-<step>.png``, any other ``final.png``. Validation steps return images as
    ``{"images": (B, 3, H, W) in [0, 1], "rows": B row names}``. Only images of the first process are shown.

    Args:
        columns: images per row at most.
        every_n_validations: how often.

    Raises:
        UserError: if a number is below 1.
    """

    def __init__(self, columns: int = 8, every_n_validations: int = 1) -> None:
        check_at_least("image_grid", 1, columns=columns, every_n_validations=every_n_validations)
        self.columns, self.every_n_validations = columns, every_n_validations
        self._rows: dict[str, list[Tensor]] = {}
        self._validations = 0

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's hook
        batch: Any,  # noqa: ANN401 - Lightning's hook
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the first images of each row."""
        if not trainer.is_global_zero or not isinstance(outputs, dict):
            return
        for image, row in zip(outputs["images"], outputs["rows"], strict=True):
            images = self._rows.setdefault(row, [])
            if len(images) < self.columns:
                images.append(image)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the sheet."""
        rows, self._rows = self._rows, {}
        if not rows or trainer.sanity_checking:
            return
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._validations += fitting
        if fitting and (self._validations - 1) % self.every_n_validations:
            return
        image = sheet([(name, [to_image(image) for image in images]) for name, images in rows.items()])
        # A validation apart from training is of the best tokens, whatever step the training ended at.
        name = f"{VALIDATION}/step-{trainer.global_step:06d}.png" if fitting else FINAL_SHEET
        save_image(image, Path(trainer.default_root_dir) / name)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                pixels = np.asarray(image)
                logger.experiment.add_image(VALIDATION, pixels, trainer.global_step, dataformats="HWC")

    def state_dict(self) -> dict[str, Any]:
        """The number of validations, so that a resumed run writes the same sheets."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of validations."""
        self._validations = state_dict["validations"]
