"""Several text encoders, as in Stable Diffusion XL: a key for each encoder, in all programs.

diffusers is handed the tensors one encoder at a time. Early scripts number the encoders instead, ``text_encoders_0``
and so on, and give the file the suffix ``.pti``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenlearn.tokens.files.encoders import ENCODERS, encoder_of_key
from tokenlearn.tokens.files.family import Found
from tokenlearn.tokens.files.safetensors_files import Array

_NUMBERED = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}


def arrays(encoders: Sequence[str], vectors: Sequence[Array]) -> dict[str, Array]:
    """Arrays of a file by their keys.

    Args:
        encoders: names of the text encoders.
        vectors: (n, width) per text encoder.
    """
    pairs = zip(encoders, vectors, strict=True)
    return {key: vector for name, vector in pairs for key in ENCODERS[name].keys}


def find(keys: frozenset[str], source: Path) -> list[Found]:
    """See :class:`tokenlearn.tokens.files.family.Reader`; some of the keys are a file for some of the encoders."""
    if keys and keys <= _NUMBERED.keys():
        numbered = sorted(keys)
        return [Found(tuple(numbered), tuple(_NUMBERED[key] for key in numbered))]
    if not keys or not all(encoder_of_key(key) for key in keys):
        return []
    present = {encoder_of_key(key) for key in keys}
    encoders = tuple(name for name in ENCODERS if name in present)
    return [Found(tuple(next(key for key in ENCODERS[name].keys if key in keys) for name in encoders), encoders)]
