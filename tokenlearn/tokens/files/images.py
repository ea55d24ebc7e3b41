"""Embeddings inside of images, as AUTOMATIC1111 shares them: PNG with a text entry, or PNG and WEBP with hidden data.

The text entry ``sd-ti-embedding`` is JSON in base 64. Hidden data are zlib-compressed JSON: the lower halves of its
bytes are the lower halves of the pixel values in a block left of the picture, the upper halves those of a block right
of it. A black column separates each block from the picture, and both are masked by numbers of a fixed generator
(``modules/textual_inversion/image_embedding.py`` of AUTOMATIC1111 1.10).
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tokenlearn.errors import UserError, reason_of
from tokenlearn.tokens.files import a1111
from tokenlearn.tokens.files.family import Content
from tokenlearn.tokens.files.safetensors_files import Array

SUFFIXES = (".png", ".webp")
_ENTRY = "sd-ti-embedding"
_TENSOR = "TORCHTENSOR"
_MOST_PIXELS = 2**25


def read_image(source: Path, most_bytes: int) -> Content:
    """The content of an embedding in an image.

    Args:
        source: the image.
        most_bytes: largest size of the JSON.

    Raises:
        UserError: if the file is no image, or has no embedding in it.
    """
    from PIL import Image  # imported for images alone

    try:
        with Image.open(source) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise UserError(f"'{source}' has {image.width}x{image.height} pixels; is it an image of an embedding?")
            entry = image.info.get(_ENTRY)
            if isinstance(entry, str):
                text = base64.b64decode(entry)
            else:
                text = _hidden(np.asarray(image.convert("RGB")), most_bytes)
        content = json.loads(text, object_hook=_tensors) if len(text) <= most_bytes else None
    except UserError:
        raise
    except (OSError, ValueError, zlib.error, binascii.Error, RecursionError) as error:
        raise UserError(
            f"'{source}' is an image without an embedding in it ({reason_of(error)}); give an embedding file"
        ) from None
    if not isinstance(content, dict) or not a1111.is_training(content):
        raise UserError(f"'{source}' is an image without an embedding in it; give an embedding file")
    return a1111.read_training(content, content["string_to_param"])


def _tensors(entry: dict[str, Any]) -> Any:  # noqa: ANN401 - an array, or what JSON holds
    return np.array(entry[_TENSOR], dtype=np.float32) if _TENSOR in entry else entry


def _hidden(pixels: Array, most_bytes: int) -> bytes:
    """The data in the two blocks beside a picture of pixels (H, W, 3)."""
    visible: Array = pixels.min(axis=2) > 0
    rows, columns = np.flatnonzero(visible.max(axis=1)), np.flatnonzero(visible.max(axis=0))
    if not len(rows):
        raise ValueError("a black image")
    halves = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 0x0F
    black = np.flatnonzero(halves.sum(axis=(0, 2)) == 0)
    if len(black) < 2:
        raise ValueError("no black columns")
    low, high = (_unmasked(block) for block in (halves[:, : black[0]], halves[:, black[-1] + 1 :]))
    unpacker = zlib.decompressobj()
    return unpacker.decompress((high << 4 | low).tobytes(), most_bytes)


def _unmasked(block: Array) -> Array:
    """A block (H, W, 3) without its mask: a linear congruential generator, modulo 255, of which 4 bits are used."""

    def numbers() -> Any:  # noqa: ANN401 - an iterator
        state = 0
        while True:
            state = (1664525 * state + 1013904223) % 2**32
            yield state % 255

    mask = np.fromiter(islice(numbers(), block.size), dtype=np.uint8, count=block.size)
    unmasked: Array = block ^ (mask.reshape(block.shape) & 0x0F)
    return unmasked
