"""Edited pictures as files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image, ImageOps
from torch import Tensor

from tokenlearn.callbacks.pictures import save_picture, sheet, to_image
from tokenlearn.data.pictures import GeneratedPictures
from tokenlearn.methods.edit import Edit, Edited, edit_name

_TILE = 160
_BEFORE = "before"


class EditWriter(L.Callback):
    """Write edits of pictures to the run folder as soon as they are there, and a sheet of the first ones at the end.

    ``images/<edit>/<name>.png`` is an edit at the picture's own size, ``strips/<name>.png`` its interpolations,
    ``before_after.png`` the sheet; generated pictures are in ``images/before/``. A picture that has all of its files
    is not edited again, so an interrupted run with the same ``--output_dir`` goes on where it stopped.

    Args:
        rows: pictures on the sheet at most.
        overwrite: edit all pictures again and replace files that are there.
    """

    def __init__(self, rows: int = 8, overwrite: bool = False) -> None:
        self.rows, self.overwrite = rows, overwrite
        self._run_folder = Path()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Agree on the run folder, and let the task leave out what is there already."""
        if not isinstance(pl_module, Edit):
            return
        # Each process names the folder by its own start time, and the first one's counts.
        self._run_folder = Path(trainer.strategy.broadcast(trainer.default_root_dir))
        if not self.overwrite:
            pl_module.is_done = lambda name: all(path.is_file() for path in self._paths(pl_module, name).values())

    def _paths(self, task: Edit, name: str) -> dict[str, Path]:
        """Files of a picture: those of its edits by their names, then the others."""
        stems = [edit_name(edit) for edit in task.edits]
        if isinstance(task.pictures, GeneratedPictures):
            stems.append(_BEFORE)
        paths = {stem: self._run_folder / "images" / stem / f"{name}.png" for stem in stems}
        return paths | ({"strip": self._run_folder / "strips" / f"{name}.png"} if task.interpolations else {})

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's hook
        batch: Any,  # noqa: ANN401 - Lightning's hook
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the files of a picture."""
        if not isinstance(outputs, Edited) or not isinstance(pl_module, Edit):
            return
        paths = self._paths(pl_module, outputs.picture.name)
        images: dict[str, Tensor] = {
            edit_name(edit): image for edit, image in zip(pl_module.edits, outputs.edits, strict=True)
        }
        images[_BEFORE] = outputs.before
        for stem, path in paths.items():
            if path.is_file() and not self.overwrite:
                continue
            if stem == "strip":
                save_picture(_strip(pl_module, outputs), path)
            else:
                edited = to_image(images[stem])
                save_picture(edited.resize(outputs.picture.size, Image.Resampling.LANCZOS), path)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the sheet: a row per picture, a column per edit."""
        if not isinstance(pl_module, Edit):
            return
        trainer.strategy.barrier("edits of all processes")
        if not trainer.is_global_zero or not pl_module.edits:
            return
        rows = list(self._sheet_rows(pl_module))
        if rows:
            captions = ["before", *(_caption(edit) for edit in pl_module.edits)]
            save_picture(sheet(rows, above=[captions]), self._run_folder / "before_after.png")

    def _sheet_rows(self, task: Edit) -> Iterator[tuple[str, list[Image.Image]]]:
        for index, name in enumerate(task.pictures.names[: self.rows]):
            paths = self._paths(task, name)
            if not all(path.is_file() for path in paths.values()):
                continue  # the run was limited to fewer batches
            read = task.pictures[index].image
            before = Image.open(paths[_BEFORE]) if read is None else to_image(read[0])
            edits = [Image.open(paths[edit_name(edit)]) for edit in task.edits]
            yield name, [_tile(picture) for picture in (before, *edits)]


def _strip(task: Edit, edited: Edited) -> Image.Image:
    """A row per token: the picture, and its edits from the first scale to the last."""
    rows: list[tuple[str, list[Image.Image]]] = []
    above: list[list[str]] = []
    for token, images in edited.strips.items():
        rows.append((token, [_tile(to_image(image)) for image in (edited.before, *images)]))
        above.append(["before", *(f"{scale:+g}" if scale else "0" for scale in task.interpolations[token])])
    return sheet(rows, above)


def _caption(edit: dict[str, float]) -> str:
    return "\n".join(f"{token} {scale:+g}" for token, scale in edit.items())


def _tile(picture: Image.Image) -> Image.Image:
    """A picture of any size within a square."""
    return ImageOps.pad(picture.convert("RGB"), (_TILE, _TILE), Image.Resampling.BICUBIC, color="white")
