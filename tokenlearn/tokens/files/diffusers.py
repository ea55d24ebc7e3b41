"""diffusers: the key is the token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tokenlearn.tokens.files.family import Found


def tensors(token: str, vectors: Sequence[Tensor]) -> dict[str, Tensor]:
    """See :class:`tokenlearn.tokens.files.family.Family`."""
    return {token: vectors[0]}


def find(keys: frozenset[str], source: Path) -> Found | None:
    """See :class:`tokenlearn.tokens.files.family.Family`; any single key is a token."""
    return Found(tuple(keys), token=next(iter(keys))) if len(keys) == 1 else None
