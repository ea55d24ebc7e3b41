"""diffusers: the key is the token.

Its trainer for Stable Diffusion XL writes two files, ``learned_embeds`` for CLIP-L and ``learned_embeds_2`` for
CLIP-G, which are one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenlearn.tokens.files.family import Found, wrapped
from tokenlearn.tokens.files.safetensors_files import Array

_FIRST, _SECOND = "learned_embeds", "learned_embeds_2"


def arrays(token: str, vectors: Sequence[Array]) -> dict[str, Array]:
    """See :class:`tokenlearn.tokens.files.family.Writer`."""
    return {token: vectors[0]}


def find(keys: frozenset[str], source: Path) -> list[Found]:
    """See :class:`tokenlearn.tokens.files.family.Reader`.

    A single key can be anything. It names the token if it has brackets, or in a file of the trainer, whose file name
    does not. Several keys are tokens if all have brackets; other keys could be the layers of a model.
    """
    ordered = sorted(keys)
    if ordered and all(key.startswith("<") and key.endswith(">") and len(key) > 2 for key in ordered):
        return [Found((key,), token=key) for key in ordered]
    if len(ordered) == 1:
        return [Found((ordered[0],), token=wrapped(ordered[0]) if source.name.startswith(_FIRST) else None)]
    return []


def pair(path: Path) -> tuple[Path, Path] | None:
    """The two files of one token of Stable Diffusion XL, given either; None if there are no two."""
    if not path.name.startswith(_FIRST):
        return None
    end = path.name.removeprefix(_SECOND if path.name.startswith(_SECOND) else _FIRST)
    first, second = path.with_name(_FIRST + end), path.with_name(_SECOND + end)
    return (first, second) if first.is_file() and second.is_file() else None
