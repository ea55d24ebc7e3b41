"""Generated images as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image

from tokenlearn.callbacks.images import save_image, sheet, to_image
from tokenlearn.callbacks.run_folder import common_run_folder
from tokenlearn.data.images_to_edit import generated_name
from tokenlearn.errors import check_at_least
from tokenlearn.generation.results import GeneratedBatch


class PredictionWriter(BasePredictionWriter):
    """Write each generated image as PNG to ``images/`` of the run folder as soon as it is there, then a contact sheet.

    Prediction steps return a :class:`tokenlearn.generation.results.GeneratedBatch`; other predictions are ignored.

    Args:
        columns: images per row of the contact sheet at most.

    Raises:
        UserError: if there would be no column.
    """

    def __init__(self, columns: int = 8) -> None:
        check_at_least("predictions", 1, columns=columns)
        literal: Literal["batch"] = "batch"
        super().__init__(write_interval=literal)
        self.columns = columns
        self._run_folder = Path()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Agree on the run folder."""
        self._run_folder = common_run_folder(trainer)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,  # noqa: ANN401 - Lightning's hook
        batch_indices: Sequence[int] | None,
        batch: Any,  # noqa: ANN401 - Lightning's hook
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write a batch of images."""
        if not isinstance(prediction, GeneratedBatch):
            return
        for image, prompt, seed, index in zip(*prediction, strict=True):
            save_image(to_image(image), self._run_folder / "images" / f"{generated_name(index, prompt, seed)}.png")

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the contact sheet, a row per prompt."""
        trainer.strategy.barrier("images of all processes")
        if not trainer.is_global_zero:
            return
        rows: dict[str, list[Path]] = {}
        for path in sorted((self._run_folder / "images").glob("[!.]*.png"), key=_prompt_and_seed):
            rows.setdefault(path.stem.rsplit("-seed", 1)[0], []).append(path)
        if rows:
            images = [
                (name.split("-", 1)[1].replace("-", " "), [Image.open(path) for path in paths[: self.columns]])
                for name, paths in rows.items()
            ]
            save_image(sheet(images), self._run_folder / "contact_sheet.png")


def _prompt_and_seed(path: Path) -> tuple[str, int]:
    prompt, seed = path.stem.rsplit("-seed", 1)
    return prompt, int(seed)
