"""Edits of images as files."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor

from tokenlearn.callbacks.images import save_image, sheet, to_image
from tokenlearn.callbacks.origins import origin_of, say_what_is_not_of_the_run
from tokenlearn.callbacks.run_folder import common_run_folder
from tokenlearn.errors import check_at_least
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
from tokenlearn.provenance import Origin, key_of

_TILE = 160


class ResultWriter(L.Callback, ResultStore):
    """Write edits of images to the run folder as soon as they are there, and a sheet of the first ones at the end.

    ``images/<edit>/<name>.png`` is an edit at the image's size, pasted onto the image where the task says so,
    ``strips/<name>.png`` its interpolations, ``before_after.png`` (of semantic guidance ``contact_sheet.png``) the
    sheet. Generated images are in ``images/before/``, recorded guidance is in
    ``guidance/<edit>/seed<seed>.safetensors``. Optimised latents are in ``latents/<name>.safetensors``, the steps of
    their optimisation in ``losses/<name>.csv``. An image that has all of its files, made with the same settings and
    tokens from the same image, is not edited again, so an interrupted run resumes with the same ``--output_dir``.

    Args:
        rows: images on the sheet at most.
        overwrite: edit all images again, and replace existing files.

    Attributes:
        config: the run's config, for the text chunks of the images.
        expected: what an image that is made again says about itself; None otherwise.

    Raises:
        UserError: if the sheet would have no row.
    """

    def __init__(self, rows: int = 8, overwrite: bool = False) -> None:
        check_at_least("results", 1, rows=rows)
        self.rows, self.overwrite = rows, overwrite
        self.config: Mapping[str, Any] = {}
        self.expected: Mapping[str, Any] | None = None
        self._run_folder = Path()
        self._task: L.LightningModule | None = None
        self._indices: dict[str, int] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Agree on the run folder."""
        self._task = None
        if isinstance(pl_module, EditTask):
            self._run_folder = common_run_folder(trainer)
            self._task = pl_module
            self._indices = {name: index for index, name in enumerate(pl_module.images.names)}
            self.__dict__.pop("_origin", None)

    @cached_property
    def _origin(self) -> Origin:
        """Known once the tokens are loaded."""
        assert self._task is not None
        return origin_of(self._task, self.config, self.expected)

    def is_done(self, plan: ResultPlan, name: str) -> bool:
        """See :class:`tokenlearn.generation.results.ResultStore`."""
        return not self.overwrite and self._is_complete(plan, name)

    def progress(self) -> tuple[int, int] | None:
        """How many images are done, and how many there are; None if the task makes none for this callback."""
        if not isinstance(self._task, EditTask):
            return None
        plan, names = self._task.plan, self._task.images.names
        return sum(self._is_complete(plan, name) for name in names), len(names)

    def _is_complete(self, plan: ResultPlan, name: str) -> bool:
        paths = [self._run_folder / path for path in plan.files(name).values()]
        return all(path.is_file() for path in paths) and all(key_of(path) == self._key(name) for path in paths)

    def _key(self, name: str) -> str:
        assert isinstance(self._task, EditTask)
        return self._origin.key(self._task.images.identity(self._indices[name]))

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
                self._write(pl_module, result, len(outputs))

    def _write(self, task: EditTask, result: EditResult, batch_size: int) -> None:
        """Write the files of one image; recorded guidance first, because the others mean that the image is done."""
        plan, made_of, key = task.plan, result.image, self._key(result.image.name)
        for name, vectors in result.guidance.items():
            _save(vectors, "guidance", self._run_folder / "guidance" / name / f"seed{made_of.seed}.safetensors", key)
        images = dict(zip(plan.captions, result.edits, strict=True)) | {BEFORE: result.before}
        photo = task.images.path(self._indices[made_of.name])
        for kind, relative in plan.files(made_of.name).items():
            path = self._run_folder / relative
            if not self.overwrite and path.is_file() and key_of(path) == key:
                continue
            if kind == STRIP:
                save_image(_strip(plan, result), path, self._origin.png_info(key))
            elif kind == LATENTS:
                assert result.latents is not None
                _save(result.latents, "latents", path, key)
            elif kind == LOSSES:
                _write_csv([{**row, "key": key} for row in result.history], path)
            else:
                image = _at_size(result, images[kind])
                info = self._origin.png_info(
                    key,
                    prompt=made_of.prompt if made_of.image is None else None,
                    seed=made_of.seed,
                    size=image.size,
                    image=None if photo is None else str(photo.resolve()),
                    batch_size=batch_size,
                    note="" if kind == BEFORE else kind,
                )
                save_image(image, path, info)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the sheet: a row per image, a column per edit."""
        if not isinstance(pl_module, EditTask):
            return
        trainer.strategy.barrier("edits of all processes")
        if trainer.is_global_zero:
            self._write_sheet(pl_module)

    def _write_sheet(self, task: EditTask) -> None:
        plan = task.plan
        rows = list(self._sheet_rows(task)) if plan.captions else []
        if rows:
            above = [[plan.first_caption, *plan.captions.values()]]
            info = self._origin.png_info(self._origin.key("sheet"))
            save_image(sheet(rows, above=above), self._run_folder / plan.sheet, info)
        files = (self._run_folder / path for name in task.images.names for path in plan.files(name).values())
        say_what_is_not_of_the_run(self._run_folder, ["images", "strips"], files)

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


def _save(tensor: Tensor, name: str, path: Path, key: str) -> None:
    with atomic_write(path) as temporary:
        save_file({name: tensor.contiguous().cpu()}, temporary, metadata={"key": key})


def _write_csv(rows: Sequence[Mapping[str, float | str]], path: Path) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _tile(image: Image.Image) -> Image.Image:
    """An image of any size within a square."""
    return ImageOps.pad(image.convert("RGB"), (_TILE, _TILE), Image.Resampling.BICUBIC, color="white")
