"""Two text encoders, as in Stable Diffusion XL: ``clip_l`` and ``clip_g`` in all programs.

diffusers is handed the tensors one encoder at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tokenlearn.tokens.files.family import Found

KEYS = ("clip_l", "clip_g")


def tensors(token: str, vectors: Sequence[Tensor]) -> dict[str, Tensor]:
    """See :class:`tokenlearn.tokens.files.family.Family`."""
    return dict(zip(KEYS, vectors, strict=True))


def find(keys: frozenset[str], source: Path) -> Found | None:
    """See :class:`tokenlearn.tokens.files.family.Family`; one of both keys is a file for one text encoder."""
    return Found(tuple(key for key in KEYS if key in keys)) if keys and keys <= set(KEYS) else None
