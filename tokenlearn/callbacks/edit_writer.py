"""Edited pictures as files."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image, ImageOps
from safetensors.torch import save_file

from tokenlearn.callbacks.pictures import save_picture, sheet, to_image
from tokenlearn.data.pictures import GeneratedPictures
from tokenlearn.files import atomic_write
from tokenlearn.methods.picture_task import Edited, PictureTask

_TILE = 160
_BEFORE = "before"


class EditWriter(L.Callback):
    """Write edits of pictures to the run folder as soon as they are there, and a sheet of the first ones at the end.

    ``images/<edit>/<name>.png`` is an edit at the picture's own size, ``strips/<name>.png`` its interpolations,
    ``before_after.png`` (of semantic guidance ``contact_sheet.png``) the sheet; generated pictures are in
    ``images/before/``, recorded guidance in ``guidance/<edit>/seed<seed>.safetensors``. Optimised latents are in
    ``latents/<name>.safetensors``, and the steps of their optimisation in ``losses/<name>.csv``. A picture that has
    all of its files is not edited again, so an interrupted run with the same ``--output_dir`` goes on from there.

    Args:
        rows: pictures on the sheet at most.
        overwrite: edit all pictures again and replace files that are there.
    """

    def __init__(self, rows: int = 8, overwrite: bool = False) -> None:
        self.rows, self.overwrite = rows, overwrite
        self._run_folder = Path()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Agree on the run folder, and let the task leave out what is there already."""
        if not isinstance(pl_module, PictureTask):
            return
        # Each process names the folder by its own start time, and the first one's counts.
        self._run_folder = Path(trainer.strategy.broadcast(trainer.default_root_dir))
        if not self.overwrite:
            pl_module.is_done = lambda name: all(path.is_file() for path in self._paths(pl_module, name).values())

    def _paths(self, task: PictureTask, name: str) -> dict[str, Path]:
        """Files of a picture: those of its edits by their names, then the others."""
        stems = list(task.edit_names)
        if isinstance(task.pictures, GeneratedPictures):
            stems.append(_BEFORE)
        paths = {stem: self._run_folder / "images" / stem / f"{name}.png" for stem in stems}
        if task.strip_scales:
            paths["strip"] = self._run_folder / "strips" / f"{name}.png"
        if task.optimises_latents:
            paths["latents"] = self._run_folder / "latents" / f"{name}.safetensors"
            paths["losses"] = self._run_folder / "losses" / f"{name}.csv"
        return paths

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's hook
        batch: Any,  # noqa: ANN401 - Lightning's hook
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the files of pictures."""
        if isinstance(pl_module, PictureTask):
            for edited in outputs:
                self._write(pl_module, edited)

    def _write(self, task: PictureTask, edited: Edited) -> None:
        """Write the files of one picture, recorded guidance before those that tell that it is done."""
        for name, vectors in edited.guidance.items():
            path = self._run_folder / "guidance" / name / f"seed{edited.picture.seed}.safetensors"
            with atomic_write(path) as temporary:
                save_file({"guidance": vectors.contiguous().cpu()}, temporary)
        images = dict(zip(task.edit_names, edited.edits, strict=True)) | {_BEFORE: edited.before}
        for stem, path in self._paths(task, edited.picture.name).items():
            if path.is_file() and not self.overwrite:
                continue
            if stem == "strip":
                save_picture(_strip(task, edited), path)
            elif stem == "latents":
                assert edited.latents is not None
                with atomic_write(path) as temporary:
                    save_file({"latents": edited.latents.contiguous().cpu()}, temporary)
            elif stem == "losses":
                _write_csv(edited.history, path)
            else:
                image = to_image(images[stem])
                save_picture(image.resize(edited.picture.size, Image.Resampling.LANCZOS), path)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the sheet: a row per picture, a column per edit."""
        if not isinstance(pl_module, PictureTask):
            return
        trainer.strategy.barrier("edits of all processes")
        if not trainer.is_global_zero or not pl_module.edit_names:
            return
        rows = list(self._sheet_rows(pl_module))
        if rows:
            captions = [pl_module.first_caption, *pl_module.captions]
            save_picture(sheet(rows, above=[captions]), self._run_folder / pl_module.sheet_name)

    def _sheet_rows(self, task: PictureTask) -> Iterator[tuple[str, list[Image.Image]]]:
        for index, name in enumerate(task.pictures.names[: self.rows]):
            paths = self._paths(task, name)
            if not all(path.is_file() for path in paths.values()):
                continue  # the run was limited to fewer batches
            read = task.pictures[index].image
            before = Image.open(paths[_BEFORE]) if read is None else to_image(read[0])
            edits = [Image.open(paths[edit]) for edit in task.edit_names]
            yield name, [_tile(picture) for picture in (before, *edits)]


def _strip(task: PictureTask, edited: Edited) -> Image.Image:
    """A row per token: the picture, and its edits from the first scale to the last."""
    rows: list[tuple[str, list[Image.Image]]] = []
    above: list[list[str]] = []
    for caption, images in edited.strips.items():
        rows.append((caption, [_tile(to_image(image)) for image in (edited.before, *images)]))
        above.append([_BEFORE, *(task.strip_label(scale) for scale in task.strip_scales[caption])])
    return sheet(rows, above)


def _write_csv(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _tile(picture: Image.Image) -> Image.Image:
    """A picture of any size within a square."""
    return ImageOps.pad(picture.convert("RGB"), (_TILE, _TILE), Image.Resampling.BICUBIC, color="white")
