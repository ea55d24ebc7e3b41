"""Real images with labels, from any source, encoded on the device or once beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import datasets  # type: ignore[import-untyped]
import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from tokenlearn.data.image_source import ImageSource, open_images
from tokenlearn.data.labels import Label, column_labels, feature_of, list_labels
from tokenlearn.data.latent_cache import (
    CacheDtype,
    LatentCache,
    build_latents,
    in_full_batches,
    json_hash,
    weights_hash,
)
from tokenlearn.data.portraits import ATTRIBUTES
from tokenlearn.data.sharding import (
    BatchStream,
    EvaluationBatches,
    Item,
    ItemSource,
    ShuffledSource,
    Skipped,
    StreamedSource,
    ahead,
    items_below,
)
from tokenlearn.errors import UserError, check_at_least, reason_of
from tokenlearn.files import atomic_write

_HELD_OUT_SEED = 0  # not the user's: another order of training must not move test images into the training
_ENCODED_IMAGE = datasets.Image()


class ImageBatch(NamedTuple):
    """A batch of B images, in one of three forms: as pixels, as cached latents, or to be generated.

    Attributes:
        images: (B, 3, H, W) in [0, 1] at the size the backbone was trained for; None where there are latents, or
            where they are to be generated.
        latents: (B, C, h, w) scaled as the network expects them; None where they are not cached.
        labels: attribute name to (B,) int64 class indices, -1 where the class is not known.
        names: B file names or numbers.
        prompts: B prompts of generated images, else empty.
        seeds: B seeds of generated images, else empty.
    """

    images: Tensor | None
    latents: Tensor | None
    labels: dict[str, Tensor]
    names: list[str]
    prompts: Sequence[str] = ()
    seeds: Sequence[int] = ()


class ImageSample(NamedTuple):
    """One image of an :class:`ImageBatch`.

    Attributes:
        name: file name or number.
        labels: attribute name to class index.
        pixels: (H, W, 3) uint8.
        latents: (C, h, w).
    """

    name: str
    labels: dict[str, int]
    pixels: Tensor | None = None
    latents: Tensor | None = None


def collate_images(samples: Sequence[ImageSample]) -> ImageBatch:
    """A batch of samples that are all pixels, all latents, or neither."""
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    latents = [sample.latents for sample in samples if sample.latents is not None]
    return ImageBatch(
        unit_range(pixels) if pixels else None,
        torch.stack(latents) if latents else None,
        {name: torch.tensor([sample.labels[name] for sample in samples]) for name in samples[0].labels},
        [sample.name for sample in samples],
    )


def unit_range(pixels: Sequence[Tensor]) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of B pictures (H, W, 3) uint8."""
    return torch.stack(list(pixels)).permute(0, 3, 1, 2).contiguous().float() / 255


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as RGB: transparent ones on white, 16-bit grey ones with their whole range."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I"):  # a conversion would cut it off at 255
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def square_pixels(image: Image.Image, size: int) -> Tensor:
    """Pixels (size, size, 3) uint8 of an RGB picture whose shorter side is resized to ``size``, centre-cropped."""
    return torch.from_numpy(np.array(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)))


def read_image(encoded: Mapping[str, Any] | None, min_size: int) -> Image.Image:
    """Decode a picture, upright and in RGB.

    Args:
        encoded: ``{"bytes", "path"}`` as ``datasets`` stores it.
        min_size: pixels that its shorter side must have.

    Raises:
        Exception: of whatever kind the decoder raises, or ValueError for a picture that is missing or too small.
    """
    if encoded is None:
        raise ValueError("no picture")
    image: Image.Image = _ENCODED_IMAGE.decode_example(encoded)
    if min(image.size) < min_size:
        raise ValueError(f"{image.width}x{image.height} pixels, below data.min_size {min_size}")
    return to_rgb(image)


class _IndexedRows:
    """Some rows of a ``Dataset``."""

    def __init__(self, dataset: Any, indices: np.ndarray) -> None:  # noqa: ANN401 - datasets has no types
        self.dataset, self.indices = dataset, indices
        self.count = len(indices)

    def items(self) -> Iterator[Item]:
        return items_below(self.count)

    def source(self, seed: int, block_size: int) -> ItemSource:
        return ShuffledSource(self.count, seed)

    def number(self, item: Item) -> int:
        return int(self.indices[item.index])

    def row(self, item: Item) -> dict[str, Any]:
        return cast(dict[str, Any], self.dataset[self.number(item)])


class _StreamedRows:
    """Some rows in a row of an ``IterableDataset``; to the end if ``count`` is None."""

    def __init__(self, open_stream: Callable[[], Any], first: int, count: int | None) -> None:
        self.open_stream, self.first, self.count = open_stream, first, count

    def open(self) -> Any:  # noqa: ANN401 - datasets has no types
        stream = self.open_stream().skip(self.first)
        return stream if self.count is None else stream.take(self.count)

    def items(self) -> Iterator[Item]:
        return (Item(0, index, row) for index, row in enumerate(self.open()))

    def source(self, seed: int, block_size: int) -> ItemSource:
        return StreamedSource(self.open, seed, block_size)

    def number(self, item: Item) -> int:
        return self.first + item.index

    def row(self, item: Item) -> dict[str, Any]:
        return cast(dict[str, Any], item.row)


class ImageDataModule(L.LightningDataModule):
    """Images to learn from, with or without labels, resized and cropped to the size of the backbone.

    Pictures for validation and test are held out: the same ones whatever the seed, spread over the data, but the first
    ones of a stream. The others are gone through in passes; in a pass each comes once. Batches are always full: where
    a pass ends within a batch, the next one goes on. All processes together see the batches that one process with the
    same global batch would see, and a resumed run goes on with the very next one.

    Args:
        source: a folder of pictures in any depth, with ``metadata.jsonl`` or a folder per class if wanted; a folder of
            parquet files, a parquet file or a pattern such as ``data/*.parquet``; a data set that ``save_to_disk``
            wrote; ``portraits:SIZE`` for the bundled world; or a hub id.
        split: split of the data; of a folder of pictures, the subfolder of that name if there is one, else all.
        streaming: read while training instead of preparing the data first.
        revision: branch, tag or commit of a hub data set.
        portraits_seed: names the stream of portraits.
        image_column: column of pictures; files in a folder are in ``image``.
        keep: column to the values that a row must have one of there; other rows are left out.
        label_columns: attribute to the column of its class: boolean, index, name, or null for not known.
        label_classes: attribute to its class names in the order of class indices; needed for names in a stream, and
            for another order than the alphabetical one or that of the data.
        attributes_column: column of lists with a boolean, or a class index, for each of ``attribute_names``; for
            portraits their own ``attributes`` by default.
        attribute_names: names of what is in ``attributes_column``.
        size: height and width of the images in pixels; null for what the backbone was trained for.
        flips: mirror every other image at random in training.
        batch_size: images per step and device.
        batches_per_epoch: steps per epoch and device; null for one pass, rounded up, which a stream cannot tell.
        eval_batch_size: images per step and device in validation and test.
        num_workers: threads that read, decode and resize ahead of the training; 0 for none.
        seed: seed of the order of training.
        shuffle_buffer: pictures of a stream that are in memory, still encoded, to be shuffled among each other.
        validation_images: images held out for each validation; 0 for none.
        test_images: images held out for the test; 0 for none.
        transfer_keep: like ``keep``, for pictures of other kinds that nothing is learned from: a second part of the
            test shows how well what was learned holds for them.
        transfer_images: images of that part; 0 for none.
        broken_images: ``skip`` leaves out pictures that cannot be decoded or are too small and warns of their number:
            where the data are prepared, they are all checked once before, and that is remembered; in a stream, each
            device decodes the pictures of all devices. ``error`` stops at the first.
        min_size: pixels that the shorter side of a picture must have.
        cache_dir: folder for latents of the training images, encoded once before the training; null to encode in each
            step. They are the same as in the step as long as ``batch_size`` is.
        cache_dtype: precision of cached latents.
        cache_shard_size: images per cache file.

    Raises:
        UserError: for a number that is out of range, flips of cached latents, or attribute names without a column.
    """

    def __init__(
        self,
        source: str,
        split: str = "train",
        streaming: bool = False,
        revision: str | None = None,
        portraits_seed: int = 0,
        image_column: str = "image",
        keep: dict[str, list[bool | int | str]] | None = None,
        label_columns: dict[str, str] | None = None,
        label_classes: dict[str, list[str]] | None = None,
        attributes_column: str | None = None,
        attribute_names: list[str] | None = None,
        size: int | None = None,
        flips: bool = False,
        batch_size: int = 8,
        batches_per_epoch: int | None = None,
        eval_batch_size: int = 32,
        num_workers: int = 2,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        validation_images: int = 64,
        test_images: int = 64,
        transfer_keep: dict[str, list[bool | int | str]] | None = None,
        transfer_images: int = 0,
        broken_images: Literal["skip", "error"] = "skip",
        min_size: int = 16,
        cache_dir: str | None = None,
        cache_dtype: CacheDtype = "float32",
        cache_shard_size: int = 1024,
    ) -> None:
        super().__init__()
        check_at_least(
            "data",
            1,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            shuffle_buffer=shuffle_buffer,
            min_size=min_size,
            cache_shard_size=cache_shard_size,
            batches_per_epoch=batches_per_epoch,
            size=size,
        )
        check_at_least(
            "data",
            0,
            num_workers=num_workers,
            seed=seed,
            portraits_seed=portraits_seed,
            validation_images=validation_images,
            test_images=test_images,
            transfer_images=transfer_images,
        )
        if streaming and batches_per_epoch is None:
            raise UserError("data.batches_per_epoch must be set for a stream, which does not tell its length")
        if flips and cache_dir is not None:
            raise UserError("cached latents cannot be mirrored; set data.flips to false or data.cache_dir to null")
        if source.startswith("portraits:") and attributes_column is None:
            attributes_column, attribute_names = "attributes", attribute_names or list(ATTRIBUTES)
        if (attributes_column is None) != (not attribute_names):
            raise UserError("data.attributes_column and data.attribute_names need each other; set both or neither")
        self.source, self.split, self.streaming, self.revision = source, split, streaming, revision
        self.portraits_seed, self.image_column, self.keep = portraits_seed, image_column, keep or {}
        self.label_columns, self.label_classes = label_columns or {}, label_classes or {}
        self.attributes_column, self.attribute_names = attributes_column, attribute_names or []
        self.size, self.flips = size, flips
        self.batch_size, self.batches_per_epoch, self.eval_batch_size = batch_size, batches_per_epoch, eval_batch_size
        self.num_workers, self.seed, self.shuffle_buffer = num_workers, seed, shuffle_buffer
        self.validation_images, self.test_images = validation_images, test_images
        self.transfer_keep, self.transfer_images = transfer_keep or {}, transfer_images
        self.broken_images, self.min_size = broken_images, min_size
        self.cache_dir, self.cache_dtype, self.cache_shard_size = cache_dir, cache_dtype, cache_shard_size
        self.labels: list[Label] = []
        self._found: ImageSource | None = None
        self._parts: dict[str, _IndexedRows | _StreamedRows] = {}

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        """Class names of each attribute in the order of class indices, empty for numbers and booleans."""
        return {label.attribute: label.classes for label in self.labels}

    def prepare_data(self) -> None:
        """Download, prepare and check pictures; what is found is remembered for :meth:`setup`."""
        if not self.streaming:
            found = self._find()
            self._broken_rows(found, found.open())

    def setup(self, stage: str = "") -> None:
        """Find the pictures, how to read their labels, and which are held out.

        Raises:
            UserError: if anything in the settings does not fit the data or the backbone.
        """
        if self._parts:
            return
        self.size = self._checked_size()
        self._found = found = self._find()
        dataset = found.open()
        self.labels = self._make_labels(dataset)
        held_out = self.validation_images + self.test_images
        if self.streaming:
            stream = partial(_kept_stream, found.open, self._kept_values(dataset, "keep"))
            others_stream = partial(_kept_stream, found.open, self._kept_values(dataset, "transfer_keep"))
            self._parts = {
                "transfer": _StreamedRows(others_stream, 0, self.transfer_images),
                "test": _StreamedRows(stream, 0, self.test_images),
                "validation": _StreamedRows(stream, self.test_images, self.validation_images),
                "train": _StreamedRows(stream, held_out, None),
            }
            return
        sound = self._sound_rows(found, dataset)
        others = self._kept_rows(dataset, "transfer_keep", sound) if self.transfer_images else sound[:0]
        others = np.random.default_rng(_HELD_OUT_SEED).permutation(others)[: self.transfer_images]
        if len(others) < self.transfer_images:
            raise UserError(
                f"'{self.source}' has {len(others)} usable pictures of data.transfer_keep, fewer than "
                f"data.transfer_images {self.transfer_images}; lower that"
            )
        rows = np.setdiff1d(self._kept_rows(dataset, "keep", sound), others)
        if len(rows) <= held_out:
            raise UserError(
                f"'{self.source}' has {len(rows)} usable pictures, too few to hold out {self.validation_images} for "
                f"validation and {self.test_images} for test; lower data.validation_images and data.test_images"
            )
        order = np.random.default_rng(_HELD_OUT_SEED).permutation(rows)
        self._parts = {
            "test": _IndexedRows(dataset, order[: self.test_images]),
            "validation": _IndexedRows(dataset, order[self.test_images : held_out]),
            "train": _IndexedRows(dataset, np.sort(order[held_out:])),
            "transfer": _IndexedRows(dataset, others),
        }

    def train_dataloader(self) -> BatchStream[ImageSample, ImageBatch]:
        """The training stream, this rank's part; makes the cache of latents first if there is to be one."""
        trainer, rows = self._trainer(), self._parts["train"]
        length = self.batches_per_epoch
        if length is None:
            assert rows.count is not None
            length = -(-rows.count // (self.batch_size * trainer.world_size))
        latents = None if self.cache_dir is None else self._cached_latents(trainer, rows)
        return BatchStream(
            rows.source(self.seed, self.shuffle_buffer),
            partial(self._load, rows, latents=latents, training=True),
            collate_images,
            self.batch_size,
            length,
            trainer.global_rank,
            trainer.world_size,
            num_workers=self.num_workers if latents is None else 0,  # reading latents takes no time
            may_skip=self._may_skip,
        )

    def val_dataloader(self) -> EvaluationBatches[ImageSample, ImageBatch] | list[Any]:
        """Pictures held out for validation, as pixels."""
        return self._evaluation("validation") if self.validation_images else []

    def test_dataloader(self) -> list[EvaluationBatches[ImageSample, ImageBatch]]:
        """Pictures held out for the test, as pixels; then those of the transfer test, if there is one."""
        if not self.test_images:
            return []
        return [self._evaluation(part) for part in ("test", "transfer") if part == "test" or self.transfer_images]

    def single_pass(self) -> EvaluationBatches[ImageSample, ImageBatch]:
        """All training pictures once, in order, this rank's part, as pixels: for statistics over the data."""
        return self._evaluation("train")

    def _evaluation(self, part: str) -> EvaluationBatches[ImageSample, ImageBatch]:
        trainer, rows = self._trainer(), self._parts[part]
        return EvaluationBatches(
            rows.items,
            rows.count,
            partial(self._load, rows),
            collate_images,
            self.eval_batch_size,
            trainer.global_rank,
            trainer.world_size,
            self.num_workers,
        )

    @property
    def _may_skip(self) -> bool:
        # Pictures that are not streamed have been checked before, and portraits are as they should be.
        checked = not self.streaming or self.source.startswith("portraits:")
        return self.broken_images == "skip" and not checked

    def _load(
        self,
        rows: _IndexedRows | _StreamedRows,
        item: Item,
        latents: LatentCache | None = None,
        training: bool = False,
    ) -> ImageSample | Skipped:
        row = rows.row(item)
        name = self._name(row, rows.number(item))
        labels = {label.attribute: label.class_index(row, name) for label in self.labels}
        if latents is not None:
            if (cached := latents[item.index]) is None:
                return Skipped(name, "found when latents were cached")
            return ImageSample(name, labels, latents=cached)
        try:
            image = read_image(row[self.image_column], self.min_size)
        except Exception as error:  # decoders raise all sorts
            if self._may_skip:
                return Skipped(name, reason_of(error))
            raise UserError(
                f"picture '{name}' of '{self.source}' cannot be used ({reason_of(error)}); remove or replace it"
                + ("" if self.broken_images == "skip" else ", or set data.broken_images to skip")
            ) from None
        assert self.size is not None
        pixels = square_pixels(image, self.size)
        if training and self.flips:
            draw = np.random.default_rng([self.seed, item.pass_number, item.index]).random()
            pixels = pixels.flip(1) if draw < 0.5 else pixels
        return ImageSample(name, labels, pixels)

    def _name(self, row: Mapping[str, Any], number: int) -> str:
        encoded = row[self.image_column]
        path = encoded and encoded.get("path")
        if not path:
            return f"{number:08d}"
        folder = Path(self.source).expanduser().resolve()
        return str(Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else Path(path).name

    def _cached_latents(self, trainer: L.Trainer, rows: _IndexedRows | _StreamedRows) -> LatentCache:
        backbone = cast(Any, trainer.lightning_module).backbone
        assert self.cache_dir is not None
        assert self._found is not None
        key = {
            "model": backbone.pretrained,
            "weights": weights_hash(getattr(backbone, "vae", backbone)),
            "transform": ["shorter side resized, bicubic, centre crop", self.size],
            "data": [self._found.fingerprint, self.keep, self.streaming, self.broken_images, self.min_size],
            "held out": [self.test_images, self.validation_images, self.transfer_keep, self.transfer_images],
        }
        cache = LatentCache.of_trainer(trainer, self.cache_dir, key, self.cache_dtype, self.cache_shard_size)

        def encode(items: Sequence[Item]) -> list[Tensor | None]:
            there: list[bool] = []

            def pixels() -> Iterator[Tensor]:
                for sample in ahead(partial(self._load, rows), items, self.num_workers, 2 * self.batch_size):
                    there.append(isinstance(sample, ImageSample))
                    if isinstance(sample, ImageSample) and sample.pixels is not None:
                        yield sample.pixels

            def latents_of(batch: Sequence[Tensor]) -> Tensor:
                return cast(Tensor, backbone.encode_images(unit_range(batch).to(backbone.device)))

            latents = iter(list(in_full_batches(latents_of, pixels(), self.batch_size)))
            return [next(latents) if present else None for present in there]

        return build_latents(trainer, cache, rows.items(), encode, rows.count)

    def _find(self) -> ImageSource:
        return open_images(
            self.source, self.image_column, self.split, self.streaming, self.revision, self.portraits_seed
        )

    def _checked_size(self) -> int:
        backbone = cast(Any, self._trainer().lightning_module).backbone
        factor: int = backbone.vae_scale_factor
        if self.size is None:
            return int(backbone.latent_size * factor)
        if self.size % factor:
            raise UserError(
                f"data.size {self.size} is not a multiple of {factor} pixels, as the backbone needs; set it to "
                f"{max(1, round(self.size / factor)) * factor}"
            )
        return self.size

    def _sound_rows(self, found: ImageSource, dataset: Any) -> np.ndarray:  # noqa: ANN401 - datasets has no types
        """Indices of the rows whose pictures are not broken."""
        sound = np.ones(len(dataset), dtype=bool)
        of_use = np.union1d(
            self._kept_rows(dataset, "keep", np.arange(len(dataset))),
            self._kept_rows(dataset, "transfer_keep", np.arange(len(dataset))) if self.transfer_images else [],
        )
        broken = {index: what for index, what in self._broken_rows(found, dataset).items() if index in of_use}
        sound[list(broken)] = False
        if broken:
            rank_zero_warn(
                f"skipped {len(broken)} of the pictures in '{self.source}' that cannot be used, such as "
                f"{next(iter(broken.values()))}"
            )
        return np.flatnonzero(sound)

    def _kept_rows(
        self,
        dataset: Any,  # noqa: ANN401 - datasets has no types
        setting: Literal["keep", "transfer_keep"],
        rows: np.ndarray,
    ) -> np.ndarray:
        """Those of ``rows`` that have the values to keep by a setting."""
        kept = np.ones(len(dataset), dtype=bool)
        for column, values in self._kept_values(dataset, setting).items():
            kept &= np.fromiter((value in values for value in dataset[column]), dtype=bool, count=len(dataset))
        of_use: np.ndarray = rows[kept[rows]]
        return of_use

    def _broken_rows(self, found: ImageSource, dataset: Any) -> dict[int, str]:  # noqa: ANN401 - datasets has no types
        """What is wrong with which row, remembered where ``datasets`` keeps prepared data."""
        if found.portraits or self.broken_images == "error":
            return {}
        name = json_hash([found.fingerprint, self.min_size])
        memo = Path(datasets.config.HF_DATASETS_CACHE) / "tokenlearn" / f"{name}.json"
        if memo.is_file():
            return {int(index): what for index, what in json.loads(memo.read_text()).items()}

        def fault(index: int) -> str | None:
            row = dataset[index]
            try:
                read_image(row[self.image_column], self.min_size)
            except Exception as error:  # decoders raise all sorts
                return f"'{self._name(row, index)}' ({reason_of(error)})"
            return None

        indices = range(len(dataset))
        faults: Iterable[str | None] = ahead(fault, indices, self.num_workers, 64)
        shown = tqdm(faults, desc="Checking images", unit="image", total=len(indices), leave=False)
        broken = {index: what for index, what in enumerate(shown) if what is not None}
        with atomic_write(memo) as temporary:
            temporary.write_text(json.dumps(broken))
        return broken

    def _kept_values(
        self,
        dataset: Any,  # noqa: ANN401 - datasets has no types
        setting: Literal["keep", "transfer_keep"],
    ) -> dict[str, list[Any]]:
        """Values to keep by a setting as the columns hold them."""
        kept: dict[str, list[Any]] = {}
        keep: Mapping[str, Sequence[Any]] = getattr(self, setting)
        for column, values in keep.items():
            feature = feature_of(dataset, column, setting)
            if isinstance(feature, datasets.ClassLabel):
                if unknown := [value for value in values if value not in feature.names]:
                    raise UserError(
                        f"data.{setting}: column '{column}' has no class '{unknown[0]}'; it has "
                        f"{', '.join(feature.names)}"
                    )
                kept[column] = [feature.names.index(value) for value in values]
            else:
                kept[column] = list(values)
        return kept

    def _make_labels(self, dataset: Any) -> list[Label]:  # noqa: ANN401 - datasets has no types
        labels = column_labels(dataset, self.label_columns, self.label_classes)
        if self.attributes_column is not None:
            labels += list_labels(dataset, self.attributes_column, self.attribute_names)
        return labels

    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError(
                "ImageDataModule reads ranks and the backbone from its trainer; hand it to Trainer.fit or test"
            )
        return self.trainer


def _kept_stream(open_stream: Callable[[], Any], kept: Mapping[str, Sequence[Any]]) -> Any:  # noqa: ANN401 - as above
    if not kept:
        return open_stream()
    return open_stream().filter(partial(_is_kept, list(kept.values())), input_columns=list(kept))


def _is_kept(kept: Sequence[Sequence[Any]], *values: object) -> bool:
    return all(value in allowed for value, allowed in zip(values, kept, strict=True))
