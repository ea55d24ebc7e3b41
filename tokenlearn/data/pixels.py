"""Images as pixels: decoding, colours, sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def unit_range(pixels: Sequence[Tensor]) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of B images (H, W, 3) uint8."""
    return torch.stack(list(pixels)).permute(0, 3, 1, 2).contiguous().float() / 255


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: transparent ones on white, 16-bit grey ones with their whole range."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I"):  # a conversion would cut it off at 255
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


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
    image: Image.Image = _decoder().decode_example(encoded)
    if min(image.size) < min_size:
        raise ValueError(f"{image.width}x{image.height} pixels, below data.images.min_size {min_size}")
    return to_rgb(image)


@cache
def _decoder() -> Any:  # noqa: ANN401 - datasets has no types
    import datasets  # type: ignore[import-untyped]

    return datasets.Image()
