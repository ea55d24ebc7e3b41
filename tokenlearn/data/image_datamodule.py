"""Real images with labels, from any source, encoded on the device in each step or once in advance."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from tokenlearn.data.batches import ImageBatch
from tokenlearn.data.broken_images import broken_rows
from tokenlearn.data.image_samples import ImageLoader, ImageReading, ImageSample, collate_images
from tokenlearn.data.image_source import ImageSource, is_portraits, open_images, scenes_of, where_labels_go
from tokenlearn.data.interfaces import DrawnImages, ImageConsumer, LabelledImages, consumer_of, trainer_of
from tokenlearn.data.labels import Label, LabelColumns, check_first_label_values, check_label_values, read_labels
from tokenlearn.data.latent_cache import LatentCache, LatentCaching, build_latents, in_full_batches
from tokenlearn.data.pixels import unit_range
from tokenlearn.data.prefetch import prefetch
from tokenlearn.data.rows import HeldOut, Keep, Parts, Rows, indexed_parts, kept_mask, streamed_parts
from tokenlearn.data.sources import Item
from tokenlearn.data.streams import BatchStream, EvaluationBatches
from tokenlearn.errors import UserError, check_at_least

if TYPE_CHECKING:
    from tokenlearn.data.portraits import Scene


class ImageDataModule(L.LightningDataModule, LabelledImages, DrawnImages):
    """Images to learn from, with or without labels, resized and cropped to the size of the backbone.

    Training images are read in passes, each image once in a pass. Batches are always full: a batch within which a pass
    ends is filled up by the next pass. All processes together see the batches that one process with the same global
    batch would see, and a resumed run continues with the next batch.

    Args:
        source: a folder of images in any depth, with ``metadata.jsonl`` or a folder per class if wanted; a CSV file
            with columns such as ``path`` and ``label``; a folder of parquet files, a parquet file or a pattern such as
            ``data/*.parquet``; a data set that ``save_to_disk`` wrote; a hub id, ``owner/name`` or
            ``owner/name@revision``; or ``portraits:SIZE`` or ``portraits:SIZE:SEED`` for the bundled world, with
            ``:personas`` for its personas alone.
        split: split of the data; of a folder of images, the subfolder of this name if there is one, else all.
        streaming: read while training instead of preparing the data first.
        keep: column to the values of which a row must have one; other rows are left out.
        labels: columns with the classes of attributes.
        images: how images are read.
        held_out: numbers of images for validation and test.
        batch_size: images per step and device.
        batches_per_epoch: steps per epoch and device; null for one pass, rounded up, which a stream cannot tell.
        eval_batch_size: images per step and device in validation and test; null for ``batch_size``, so that they fit
            where the training does.
        seed: seed of the order of training.
        num_workers: threads that read, decode and resize in advance of the training; 0 for none.
        shuffle_buffer: images of a stream that are in memory, still encoded, to be shuffled among each other.
        cache: where latents of the training images are cached, encoded once before the training; null to encode in
            each step. They are the same as in the step as long as ``batch_size`` is.

    Raises:
        UserError: for a number that is out of range, a stream without ``batches_per_epoch``, or flips of cached
            latents.
    """

    def __init__(
        self,
        source: str,
        split: str = "train",
        *,
        streaming: bool = False,
        keep: Keep | None = None,
        labels: LabelColumns = LabelColumns(),  # noqa: B008 - frozen
        images: ImageReading = ImageReading(),  # noqa: B008 - frozen
        held_out: HeldOut = HeldOut(),  # noqa: B008 - frozen
        batch_size: int = 8,
        batches_per_epoch: int | None = None,
        eval_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 2,
        shuffle_buffer: int = 1000,
        cache: LatentCaching | None = None,
    ) -> None:
        super().__init__()
        check_at_least(
            "data",
            1,
            batch_size=batch_size,
            batches_per_epoch=batches_per_epoch,
            eval_batch_size=eval_batch_size,
            shuffle_buffer=shuffle_buffer,
        )
        check_at_least("data", 0, seed=seed, num_workers=num_workers)
        if streaming and batches_per_epoch is None:
            raise UserError(
                "data.batches_per_epoch is null, and a stream does not tell its length; set it, such as to 100"
            )
        if images.flips and cache is not None:
            raise UserError("cached latents cannot be mirrored; set data.images.flips to false or data.cache to null")
        self.source, self.split, self.streaming, self.keep = source, split, streaming, keep or {}
        self.labels = _with_portrait_attributes(labels) if is_portraits(source) else labels
        self.images, self.held_out, self.cache = images, held_out, cache
        self.batch_size, self.batches_per_epoch = batch_size, batches_per_epoch
        self.eval_batch_size = eval_batch_size or batch_size
        self.seed, self.num_workers, self.shuffle_buffer = seed, num_workers, shuffle_buffer
        self._labels: list[Label] = []
        self._found: ImageSource | None = None
        self._parts: Parts | None = None
        self._load: ImageLoader | None = None

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        """Class names of each attribute in the order of class indices, empty for numbers and booleans."""
        return {label.attribute: label.classes for label in self._labels}

    def scenes(self, names: Sequence[str]) -> Sequence[Scene]:
        """See :class:`DrawnImages`."""
        return scenes_of(self.source, [int(name) for name in names]) if is_portraits(self.source) else []

    def prepare_data(self) -> None:
        """Download, prepare and check images; the result is remembered for :meth:`setup`."""
        if not self.streaming:
            found = self._open()
            broken_rows(found.open(), found, self.images, self.source, self.num_workers)

    def setup(self, stage: str = "") -> None:
        """Find the images, how to read their labels, and which are held out.

        Raises:
            UserError: if a setting does not fit the data or the backbone.
        """
        if self._parts is not None:
            return
        size = self._size()
        self._found = self._open()
        dataset = self._found.open()
        try:
            self._labels = read_labels(dataset, self.labels)
        except UserError as error:
            raise UserError(f"{error}{where_labels_go(self.source, dataset.features)}") from None
        # Prepared images have been checked before, and portraits are never broken.
        may_skip = self.images.broken == "skip" and self.streaming and not self._found.portraits
        self._load = ImageLoader(self.source, self.images, self._labels, size, may_skip, self.seed)
        if self.streaming:
            if not self._found.portraits:
                check_first_label_values(self._found.open(), self._labels)
            self._parts = streamed_parts(self._found.open, dataset, keep=self.keep, held_out=self.held_out)
        else:
            if not self._found.portraits:
                check_label_values(dataset, self._labels)
            usable = self._usable_rows(dataset, self._found)
            self._parts = indexed_parts(dataset, usable, keep=self.keep, held_out=self.held_out, source=self.source)

    def train_dataloader(self) -> BatchStream[ImageSample, ImageBatch]:
        """The training stream, this rank's part; makes the cache of latents first if there is to be one."""
        trainer, (parts, load) = trainer_of(self), self._ready()
        length = self.batches_per_epoch
        if length is None:
            assert parts.train.count is not None
            length = -(-parts.train.count // (self.batch_size * trainer.world_size))
        latents = None if self.cache is None else self._cached_latents(trainer, self.cache)
        return BatchStream(
            parts.train.source(self.seed, self.shuffle_buffer),
            partial(load, parts.train, latents=latents, training=True),
            collate_images,
            batch_size=self.batch_size,
            length=length,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            num_workers=self.num_workers if latents is None else 0,  # reading latents takes no time
            may_skip=load.may_skip,
        )

    def val_dataloader(self) -> EvaluationBatches[ImageSample, ImageBatch] | list[Any]:
        """Images held out for validation, as pixels."""
        return self._evaluation(self._ready()[0].validation) if self.held_out.validation else []

    def test_dataloader(self) -> list[EvaluationBatches[ImageSample, ImageBatch]]:
        """Images held out for the test, as pixels; then those of the transfer test, if there is one."""
        if not self.held_out.test:
            return []
        parts, _ = self._ready()
        return [self._evaluation(rows) for rows in (parts.test, *([parts.transfer] if self.held_out.transfer else []))]

    def _evaluation(self, rows: Rows) -> EvaluationBatches[ImageSample, ImageBatch]:
        trainer, (_, load) = trainer_of(self), self._ready()
        return EvaluationBatches(
            rows.items,
            rows.count,
            partial(load, rows),
            collate_images,
            batch_size=self.eval_batch_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            num_workers=self.num_workers,
        )

    def _ready(self) -> tuple[Parts, ImageLoader]:
        assert self._parts is not None, "setup() comes first"
        assert self._load is not None, "setup() comes first"
        return self._parts, self._load

    def _open(self) -> ImageSource:
        return open_images(self.source, image_column=self.images.column, split=self.split, streaming=self.streaming)

    def _size(self) -> int:
        """Height and width of the images."""
        task = consumer_of(trainer_of(self), ImageConsumer)
        size, multiple = self.images.size, task.size_multiple
        if size is None:
            return task.image_size
        if size % multiple:
            raise UserError(
                f"data.images.size {size} is not a multiple of {multiple} pixels, as the backbone needs; set it to "
                f"{max(1, round(size / multiple)) * multiple}"
            )
        return size

    def _usable_rows(self, dataset: Any, found: ImageSource) -> np.ndarray:  # noqa: ANN401 - datasets has no types
        """Positions of the rows whose images are not broken; warns of broken ones among the rows in use.

        Raises:
            UserError: if all of them are broken.
        """
        used = kept_mask(dataset, self.keep, "keep")
        if self.held_out.transfer:
            used |= kept_mask(dataset, self.held_out.transfer_keep, "held_out.transfer_keep")
        faults = broken_rows(dataset, found, self.images, self.source, self.num_workers)
        broken = {index: reason for index, reason in faults.items() if used[index]}
        if broken and len(broken) == used.sum():
            raise UserError(
                f"none of the {len(broken)} images in '{self.source}' can be used, such as "
                f"{next(iter(broken.values()))}; remove or replace them"
            )
        if broken:
            rank_zero_warn(
                f"skipped {len(broken)} of the images in '{self.source}' that cannot be used, such as "
                f"{next(iter(broken.values()))}"
            )
        return np.setdiff1d(np.arange(len(dataset)), list(broken))

    def _cached_latents(self, trainer: L.Trainer, cache: LatentCaching) -> LatentCache:
        task, (parts, load) = consumer_of(trainer, ImageConsumer), self._ready()
        rows = parts.train
        assert self._found is not None
        key = {
            "encoder": task.encoder_key(),
            "transform": ["shorter side resized, bicubic, centre crop", load.size],
            "data": [self._found.fingerprint, self.streaming, self.keep, self.images.broken, self.images.min_size],
            "held out": dataclasses.asdict(self.held_out),
        }

        def encode(items: Sequence[Item]) -> list[Tensor | None]:
            usable: list[bool] = []

            def pixels() -> Iterator[Tensor]:
                samples = prefetch(partial(load, rows), items, workers=self.num_workers, depth=2 * self.batch_size)
                for sample in samples:
                    usable.append(isinstance(sample, ImageSample))
                    if isinstance(sample, ImageSample) and sample.pixels is not None:
                        yield sample.pixels

            def latents_of(batch: Sequence[Tensor]) -> Tensor:
                return task.encode_images(unit_range(batch))

            latents = iter(list(in_full_batches(latents_of, pixels(), self.batch_size)))
            return [next(latents) if present else None for present in usable]

        return build_latents(trainer, cache, key, rows.items(), encode, total=rows.count)


def _with_portrait_attributes(labels: LabelColumns) -> LabelColumns:
    from tokenlearn.data.portraits.scene import ATTRIBUTES

    if labels.list_column is not None:
        return labels
    return dataclasses.replace(labels, list_column="attributes", list_attributes=list(ATTRIBUTES))
