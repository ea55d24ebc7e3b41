"""Sheets of images with captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from tokenlearn.files import atomic_write
from tokenlearn.pipeline import to_images

_GAP = 4
_SMALLEST_SIDE = 96
_LINE_HEIGHT = 18


def to_image(image: Tensor) -> Image.Image:
    """An image of (3, H, W) in [0, 1], rounded as diffusers rounds. NaN is black: a sheet must not end a training."""
    return to_images(image.nan_to_num()[None])[0]


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], above: Sequence[Sequence[str]] = ()) -> Image.Image:
    """A sheet of rows of images, each with its caption on the left; small images are enlarged.

    Args:
        rows: caption and images of each row; all images are shown at the size of the first.
        above: captions of one or more lines above the images of each row; of the first rows, or none.
    """
    first = rows[0][1][0]
    scale = max(1, -(-_SMALLEST_SIDE // min(first.size)))
    width, height = (side * scale for side in first.size)
    font = ImageFont.load_default(size=14)
    margin = round(max(font.getlength(caption) for caption, _ in rows)) + 2 * _GAP
    columns = max(len(images) for _, images in rows)
    heads = [_LINE_HEIGHT * max(caption.count("\n") + 1 for caption in captions) for captions in above]
    heads += [0] * (len(rows) - len(heads))
    size = (margin + columns * (width + _GAP), len(rows) * (height + _GAP) + sum(heads) + _GAP)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    top = _GAP
    for row, (caption, images) in enumerate(rows):
        top += heads[row]
        pen.text((_GAP, top + height // 2), caption, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            left = margin + column * (width + _GAP)
            if row < len(above):
                place = (left + width // 2, top - heads[row] // 2)
                pen.text(place, above[row][column], fill="black", font=font, anchor="mm", align="center")
            enlarged = image.resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(enlarged, (left, top))
        top += height + _GAP
    return canvas


def save_image(image: Image.Image, path: Path, info: PngInfo | None = None) -> Path:
    """Write a PNG file with text chunks, whole or not at all."""
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
    return path
