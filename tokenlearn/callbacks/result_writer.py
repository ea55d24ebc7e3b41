"""Edits of images as files."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor

from tokenlearn.callbacks.images import save_image, sheet, to_image
from tokenlearn.callbacks.run_folder import common_run_folder
from tokenlearn.files import atomic_write
from tokenlearn.generation.results import (
    BEFORE,
    LATENTS,
    LOSSES,
    STRIP,
    EditResult,
    EditTask,
    ResultPlan,
    ResultStore,
)
from tokenlearn.pasting import pasted_image

_TILE = 160


class ResultWriter(L.Callback, ResultStore):
    """Write edits of images to the run folder as soon as they are there, and a sheet of the first ones at the end.

    ``images/<edit>/<name>.png`` is an edit at the image's size, pasted onto the image where the task says so,
    ``strips/<name>.png`` its interpolations, ``before_after.png`` (of semantic guidance ``contact_sheet.png``) the
    sheet. Generated images are in
    ``images/before/``, recorded guidance in ``guidance/<edit>/seed<seed>.safetensors``. Optimised latents are in
    ``latents/<name>.safetensors``, and the steps of their optimisation in ``losses/<name>.csv``. An image that has all
    of its files is not edited again, so an interrupted run resumes with the same ``--output_dir``.

    Args:
        rows: images on the sheet at most.
        overwrite: edit all images again, and replace existing files.
    """

    def __init__(self, rows: int = 8, overwrite: bool = False) -> None:
        self.rows, self.overwrite = rows, overwrite
        self._run_folder = Path()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Agree on the run folder."""
        if isinstance(pl_module, EditTask):
            self._run_folder = common_run_folder(trainer)

    def is_done(self, plan: ResultPlan, name: str) -> bool:
        """See :class:`tokenlearn.generation.results.ResultStore`."""
        return not self.overwrite and self._is_complete(plan, name)

    def _is_complete(self, plan: ResultPlan, name: str) -> bool:
        return all((self._run_folder / path).is_file() for path in plan.files(name).values())

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's hook
        batch: Any,  # noqa: ANN401 - Lightning's hook
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the files of images."""
        if isinstance(pl_module, EditTask):
            for result in outputs:
                self._write(pl_module.plan, result)

    def _write(self, plan: ResultPlan, result: EditResult) -> None:
        """Write the files of one image; recorded guidance first, because the others mean that the image is done."""
        for name, vectors in result.guidance.items():
            _save(vectors, "guidance", self._run_folder / "guidance" / name / f"seed{result.image.seed}.safetensors")
        images = dict(zip(plan.captions, result.edits, strict=True)) | {BEFORE: result.before}
        for kind, relative in plan.files(result.image.name).items():
            path = self._run_folder / relative
            if path.is_file() and not self.overwrite:
                continue
            if kind == STRIP:
                save_image(_strip(plan, result), path)
            elif kind == LATENTS:
                assert result.latents is not None
                _save(result.latents, "latents", path)
            elif kind == LOSSES:
                _write_csv(result.history, path)
            else:
                save_image(_at_size(result, images[kind]), path)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the sheet: a row per image, a column per edit."""
        if not isinstance(pl_module, EditTask):
            return
        trainer.strategy.barrier("edits of all processes")
        plan = pl_module.plan
        if not trainer.is_global_zero or not plan.captions:
            return
        rows = list(self._sheet_rows(pl_module))
        if rows:
            above = [[plan.first_caption, *plan.captions.values()]]
            save_image(sheet(rows, above=above), self._run_folder / plan.sheet)

    def _sheet_rows(self, task: EditTask) -> Iterator[tuple[str, list[Image.Image]]]:
        for index, name in enumerate(task.images.names[: self.rows]):
            if not self._is_complete(task.plan, name):
                continue  # the run was limited to fewer batches
            files = task.plan.files(name)
            read = task.images[index].image
            before = Image.open(self._run_folder / files[BEFORE]) if read is None else to_image(read[0])
            edits = [Image.open(self._run_folder / files[edit]) for edit in task.plan.captions]
            yield name, [_tile(image) for image in (before, *edits)]


def _at_size(result: EditResult, edited: Tensor) -> Image.Image:
    """An edit (3, H, W) at the size of its image: pasted onto the original, or resized."""
    if result.unedited is not None and result.image.original is not None:
        return pasted_image(result.image.original, edited, result.unedited)
    return to_image(edited).resize(result.image.size, Image.Resampling.LANCZOS)


def _strip(plan: ResultPlan, result: EditResult) -> Image.Image:
    """A row per strip: the image itself, then the images of the strip."""
    rows = [
        (caption, [_tile(to_image(image)) for image in (result.before, *images)])
        for caption, images in result.strips.items()
    ]
    return sheet(rows, [[BEFORE, *plan.strips[caption]] for caption in result.strips])


def _save(tensor: Tensor, name: str, path: Path) -> None:
    with atomic_write(path) as temporary:
        save_file({name: tensor.contiguous().cpu()}, temporary)


def _write_csv(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _tile(image: Image.Image) -> Image.Image:
    """An image of any size within a square."""
    return ImageOps.pad(image.convert("RGB"), (_TILE, _TILE), Image.Resampling.BICUBIC, color="white")
