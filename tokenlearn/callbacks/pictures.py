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


def to_image(image: Tensor) -> Image.Image:
    """A picture from (3, H, W) in [0, 1], rounded as diffusers rounds."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """A sheet of rows of pictures, each with its caption on the left; small pictures are enlarged."""
    first = rows[0][1][0]
    scale = max(1, -(-_SMALLEST_SIDE // min(first.size)))
    width, height = (side * scale for side in first.size)
    font = ImageFont.load_default(size=14)
    margin = round(max(font.getlength(caption) for caption, _ in rows)) + 2 * _GAP
    columns = max(len(pictures) for _, pictures in rows)
    size = (margin + columns * (width + _GAP), len(rows) * (height + _GAP) + _GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for row, (caption, pictures) in enumerate(rows):
        top = _GAP + row * (height + _GAP)
        draw.text((_GAP, top + height // 2), caption, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            enlarged = picture.resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(enlarged, (margin + column * (width + _GAP), top))
    return canvas


def save_picture(picture: Image.Image, path: Path) -> Path:
    """Write a PNG file, whole or not at all."""
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")
    return path
