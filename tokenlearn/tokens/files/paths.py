"""Embedding files in folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenlearn.errors import UserError
from tokenlearn.paths import resolve
from tokenlearn.tokens.files.diffusers import pair

_SUFFIXES = (".safetensors", ".pt", ".bin", ".pti")  # without images, which are previews for the most part


def embedding_paths(names: Iterable[str]) -> list[Path]:
    """Files, and the embedding files directly in folders; of two files of one token, the first.

    Raises:
        UserError: if a folder has no embedding files.
    """
    found: list[Path] = []
    for path in (path for name in names for path in _paths(name)):
        two = pair(path)
        if two is None or two[0] not in found:
            found.append(path if two is None else two[0])
    return found


def _paths(name: str) -> list[Path]:
    """A file, or the embedding files of a folder."""
    path = Path(resolve(name)).expanduser()
    if not path.is_dir():
        return [path]
    found = sorted(
        file
        for file in path.iterdir()
        if file.suffix.lower() in _SUFFIXES and file.is_file() and not file.name.startswith(".")
    )
    if not found:
        raise UserError(f"folder '{name}' has no embedding files ({', '.join(_SUFFIXES)}); name another folder")
    return found
