"""Sheets of pictures with captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tokenlearn.files import atomic_write

_GAP = 4
_SMALLEST_SIDE = 96
_LINE_HEIGHT = 18


def to_image(image: Tensor) -> Image.Image:
    """A picture from (3, H, W) in [0, 1], rounded as diffusers rounds."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], above: Sequence[Sequence[str]] = ()) -> Image.Image:
    """A sheet of rows of pictures, each with its caption on the left; small pictures are enlarged.

    Args:
        rows: caption and pictures of each row; all pictures are shown at the size of the first.
        above: captions of one or more lines above the pictures of each row; of the first rows, or none.
    """
    first = rows[0][1][0]
    scale = max(1, -(-_SMALLEST_SIDE // min(first.size)))
    width, height = (side * scale for side in first.size)
    font = ImageFont.load_default(size=14)
    margin = round(max(font.getlength(caption) for caption, _ in rows)) + 2 * _GAP
    columns = max(len(pictures) for _, pictures in rows)
    heads = [_LINE_HEIGHT * max(caption.count("\n") + 1 for caption in captions) for captions in above]
    heads += [0] * (len(rows) - len(heads))
    size = (margin + columns * (width + _GAP), len(rows) * (height + _GAP) + sum(heads) + _GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    top = _GAP
    for row, (caption, pictures) in enumerate(rows):
        top += heads[row]
        draw.text((_GAP, top + height // 2), caption, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            left = margin + column * (width + _GAP)
            if row < len(above):
                place = (left + width // 2, top - heads[row] // 2)
                draw.text(place, above[row][column], fill="black", font=font, anchor="mm", align="center")
            enlarged = picture.resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(enlarged, (left, top))
        top += height + _GAP
    return canvas


def save_picture(picture: Image.Image, path: Path) -> Path:
    """Write a PNG file, whole or not at all."""
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")
    return path
