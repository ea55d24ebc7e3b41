"""Samples of images: a row decoded, resized and labelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenlearn.data.batches import ImageBatch
from tokenlearn.data.labels import Label
from tokenlearn.data.latent_cache import LatentCache
from tokenlearn.data.pixels import read_image, square_pixels, unit_range
from tokenlearn.data.rows import Rows, row_name
from tokenlearn.data.sources import Item, Skipped
from tokenlearn.errors import UserError, check_at_least, reason_of


@dataclass(frozen=True)
class ImageReading:
    """How images are read.

    Attributes:
        column: column of images; files in a folder are in ``image``.
        size: height and width in pixels; null for the size that the backbone was trained for.
        flips: mirror each training image with probability 1/2.
        min_size: smallest allowed length of an image's shorter side in pixels.
        broken: ``skip`` leaves out images that cannot be decoded or are too small and warns of their number. Prepared
            data are all checked once, and the result is remembered; in a stream, each device decodes the images of all
            devices. ``error`` stops at the first.

    Raises:
        UserError: for a size below 1.
    """

    column: str = "image"
    size: int | None = None
    flips: bool = False
    min_size: int = 16
    broken: Literal["skip", "error"] = "skip"

    def __post_init__(self) -> None:
        check_at_least("data.images", 1, size=self.size, min_size=self.min_size)


class ImageSample(NamedTuple):
    """One image of an :class:`tokenlearn.data.ImageBatch`.

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


@dataclass(frozen=True)
class ImageLoader:
    """Makes samples of rows.

    Attributes:
        source: name of the data.
        reading: how images are read.
        labels: labels to read.
        size: height and width of the samples in pixels.
        may_skip: whether broken images are skipped; otherwise they are an error.
        seed: decides which images are mirrored.
    """

    source: str
    reading: ImageReading
    labels: Sequence[Label]
    size: int
    may_skip: bool
    seed: int

    def __call__(
        self, rows: Rows, item: Item, *, latents: LatentCache | None = None, training: bool = False
    ) -> ImageSample | Skipped:
        """The sample of an item: with its cached latents if there is a cache, else with its pixels.

        Raises:
            UserError: if the image is broken and may not be skipped, or has an unknown class.
        """
        row = rows.row(item)
        name = row_name(row, rows.number(item), self.reading.column, self.source)
        labels = {label.attribute: label.class_index(row, name) for label in self.labels}
        if latents is not None:
            if (cached := latents[item.index]) is None:
                return Skipped(name, "found when latents were cached")
            return ImageSample(name, labels, latents=cached)
        try:
            image = read_image(row[self.reading.column], self.reading.min_size)
        except Exception as error:  # decoders raise errors of many kinds
            if self.may_skip:
                return Skipped(name, reason_of(error))
            raise UserError(
                f"image '{name}' of '{self.source}' cannot be used ({reason_of(error)}); remove or replace it"
                + ("" if self.reading.broken == "skip" else ", or set data.images.broken to skip")
            ) from None
        pixels = square_pixels(image, self.size)
        if training and self.reading.flips:
            mirrored = np.random.default_rng([self.seed, item.pass_number, item.index]).random() < 0.5
            pixels = pixels.flip(1) if mirrored else pixels
        return ImageSample(name, labels, pixels)
