"""Tokens of the output space: vectors that are added to a text encoder's output, which this package alone reads.

Programs for input embeddings must not mistake such a file for one. AUTOMATIC1111 and diffusers refuse files with
several keys, InvokeAI and OneTrainer files without their own key. ComfyUI and kohya take the first tensor, which here
is a version number: its width fits no text encoder, so they refuse it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tokenlearn.errors import UserError
from tokenlearn.tokens.files.family import Found
from tokenlearn.tokens.files.safetensors_files import Array

VERSION_KEY = "format"  # before the other keys in the alphabet and, as an integer, in the file
VERSION = 1
_PREFIX = "output_"


def arrays(token: str, vectors: Sequence[Array]) -> dict[str, Array]:
    """See :class:`tokenlearn.tokens.files.family.Writer`."""
    parts = {f"{_PREFIX}{index}": part for index, part in enumerate(vectors)}
    return {VERSION_KEY: np.array([VERSION])} | parts


def find(keys: frozenset[str], source: Path) -> list[Found]:
    """See :class:`tokenlearn.tokens.files.family.Reader`.

    Raises:
        UserError: if the vectors of a text encoder are missing.
    """
    parts = sorted(key for key in keys if key.startswith(_PREFIX))
    if not parts or keys != {VERSION_KEY, *parts}:
        return []
    if parts != [f"{_PREFIX}{index}" for index in range(len(parts))]:
        raise UserError(f"'{source}' lacks vectors of a text encoder, it has {', '.join(parts)}; copy it again")
    return [Found(tuple(parts))]
