"""Images as pixels: decoding, colours, sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tokenlearn.errors import reason_of
from tokenlearn.notices import warn_once

_LARGEST_OF_12_BITS = 2**12 - 1
_LARGEST_OF_16_BITS = 2**16 - 1
_OTHER_IMAGES = frozenset(
    {".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".psd", ".svg"}
)


def unit_range(pixels: Sequence[Tensor]) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of B images (H, W, 3) uint8."""
    return torch.stack(list(pixels)).permute(0, 3, 1, 2).contiguous().float() / 255


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: transparent ones on white, 16-bit grey ones with their whole range.

    Raises:
        ValueError: if the pixels are numbers whose white is not known.
    """
    if image.mode.startswith("I") or image.mode == "F":  # a conversion would cut them off at 255
        return _grey_of_numbers(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _grey_of_numbers(image: Image.Image) -> Image.Image:
    """A grey image of 16-bit integers, or of floating-point numbers in [0, 1].

    Integers up to 4095 only are of 8 or 12 bits, or are 16-bit images that are nearly black.
    """
    pixels = np.asarray(image)
    lowest, highest = pixels.min(), pixels.max()
    if image.mode == "F":
        known = bool(lowest >= 0 and highest <= 1)  # and no NaN
        grey = np.rint(np.where(known, pixels, 0) * 255)
    else:
        known = bool(lowest >= 0 and (highest == 0 or _LARGEST_OF_12_BITS < highest <= _LARGEST_OF_16_BITS))
        grey = pixels // 256
    if not known:
        raise ValueError(
            f"pixels from {lowest:g} to {highest:g} in mode {image.mode}, whose white is not known; convert it to 8 "
            "bits"
        )
    if isinstance(transparent := image.info.get("transparency"), int):
        grey = np.where(pixels == transparent, 255, grey)
    return Image.fromarray(grey.astype(np.uint8))


def warn_of_left_out(files: Iterable[Path], readable: Collection[str], folder: str | Path) -> None:
    """Warn of images in a folder that no decoder here reads, and of links to folders, which are not followed.

    Args:
        files: everything below the folder.
        readable: suffixes of files that are read.
        folder: the folder, as the user named it.
    """
    unread: Counter[str] = Counter()
    links: list[Path] = []
    for file in files:
        if (suffix := file.suffix.lower()) in _OTHER_IMAGES and suffix not in readable:
            unread[suffix] += 1
        elif file.is_symlink() and file.is_dir():
            links.append(file)
    if unread:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
        warn_once(f"left out of '{folder}': {kinds}; convert them to JPEG or PNG")
    if links:
        warn_once(
            f"left out of '{folder}': {len(links)} links to folders, such as '{links[0].name}'; name the folders "
            "themselves, or copy them"
        )


def rgb_pixels(image: Image.Image) -> Tensor:
    """Pixels (H, W, 3) uint8 of an RGB image."""
    return torch.from_numpy(np.array(image))


def square_pixels(image: Image.Image, size: int) -> Tensor:
    """Pixels (size, size, 3) uint8 of an RGB image, its shorter side resized to ``size`` and its centre cropped."""
    return rgb_pixels(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def read_image(encoded: Mapping[str, Any] | None, min_size: int = 1) -> Image.Image:
    """Decode an image, upright and in RGB.

    Args:
        encoded: ``{"bytes", "path"}`` as ``datasets`` stores it.
        min_size: smallest allowed length of the shorter side in pixels.

    Raises:
        Exception: of any kind that the decoder raises, or ValueError for an image that is missing or too small.
    """
    if encoded is None:
        raise ValueError("no image")
    try:
        image: Image.Image = _decoder().decode_example(encoded)
    except UnidentifiedImageError:  # its message has an address in memory
        raise ValueError("its bytes are not an image of a known format") from None
    if min(image.size) < min_size:
        raise ValueError(f"{image.width}x{image.height} pixels, below data.images.min_size {min_size}")
    return to_rgb(image)


def readable_squares(encoded: Iterable[Mapping[str, Any] | None], size: int, most: int, source: str) -> list[Tensor]:
    """The first images that can be decoded, as squares; others are left out with a warning.

    Args:
        encoded: images as of :func:`read_image`.
        size: height and width in pixels.
        most: number of images at most.
        source: name of the data, for the warning.

    Returns:
        Pixels (size, size, 3) uint8 of each.
    """
    squares: list[Tensor] = []
    reasons: list[str] = []
    for image in encoded:
        if len(squares) == most:
            break
        try:
            squares.append(square_pixels(read_image(image), size))
        except Exception as error:  # decoders raise errors of many kinds
            reasons.append(reason_of(error))
    if reasons:
        warn_once(f"skipped {len(reasons)} of the images in '{source}' that cannot be used, such as ({reasons[0]})")
    return squares


@cache
def _decoder() -> Any:  # noqa: ANN401 - datasets has no types
    import datasets  # type: ignore[import-untyped]

    return datasets.Image()
