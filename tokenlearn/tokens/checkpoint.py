"""What a checkpoint says about its tokens, readable without the task that wrote it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from tokenlearn.errors import UserError

CHECKPOINT_KEY = "tokenlearn"
"""Key of the entry about tokens, which has base_model, vocabulary_hash, num_vectors, embedding_widths and metadata.

It also has spaces, without which all tokens are of the input space, as in version 0.1.0.
"""

_ENTRIES: dict[str, type | tuple[type, ...]] = {
    "base_model": str,
    "vocabulary_hash": str,
    "num_vectors": dict,
    "embedding_widths": (list, tuple),
    "metadata": dict,
}
WAY_OUT = "give a .ckpt file that 'tokenlearn fit' wrote"
"""What to do about a file that is no checkpoint."""

_EMBEDDING_SUFFIXES = (".safetensors", ".pt", ".bin")


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Content of a checkpoint file, read without running code of it.

    Args:
        path: file that ``tokenlearn fit`` wrote.

    Raises:
        UserError: if there is no such file, or it is no checkpoint.
    """
    file = Path(path)
    way_out = WAY_OUT
    if file.is_dir():
        inside = next((found for name in ("last.ckpt", "*.ckpt") for found in sorted(file.rglob(name))), None)
        raise UserError(f"checkpoint '{file}' is a folder; {f'it has {inside}' if inside else way_out}")
    if not file.exists():
        raise UserError(f"no checkpoint at '{file}'; {way_out}")
    if not file.is_file():
        raise UserError(f"checkpoint '{file}' is no regular file; {way_out}")
    if file.suffix in _EMBEDDING_SUFFIXES:
        raise UserError(f"checkpoint '{file}' is an embedding file by its name; give it as an embedding, or {way_out}")
    return checkpoint_content(file, str(file))


def checkpoint_content(file: Path | IO[bytes], name: str) -> dict[str, Any]:
    """Content of a checkpoint, read without running code of it.

    Args:
        file: its file, or its bytes.
        name: what it is in messages.

    Raises:
        UserError: if it is no checkpoint.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever bytes of another kind of file lead to
        kind = type(error).__name__
        raise UserError(f"checkpoint '{name}' cannot be read ({kind}); it may be truncated; {WAY_OUT}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"'{name}' is no checkpoint: it has no state_dict; {WAY_OUT}")
    return content


def checkpoint_about(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a checkpoint about its tokens.

    Raises:
        UserError: if the checkpoint holds no learned tokens, or is damaged.
    """
    about = checkpoint.get(CHECKPOINT_KEY)
    if about is None or not any(str(key).startswith("bank.") for key in checkpoint["state_dict"]):
        raise UserError("the checkpoint holds no learned tokens; give one that 'tokenlearn fit' wrote")
    for name, kind in _ENTRIES.items():
        if not isinstance(about, dict) or not isinstance(about.get(name), kind):
            raise UserError(
                f"the checkpoint's entry about its tokens has no '{name}'; it is damaged, give another one"
            )
    counts, widths = about["num_vectors"].values(), about["embedding_widths"]
    named = about["num_vectors"].keys() <= about["metadata"].keys() and isinstance(about.get("spaces", {}), dict)
    if named and all(isinstance(number, int) for number in (*counts, *widths)):
        shapes = [(sum(counts), width) for width in widths]
        vectors = [checkpoint["state_dict"].get(f"bank.vectors.{index}") for index in range(len(widths))]
        if [tuple(tensor.shape) if isinstance(tensor, Tensor) else None for tensor in vectors] == shapes:
            found: dict[str, Any] = about
            return found
    raise UserError(
        "the checkpoint's vectors are not what its entry about its tokens says; it is damaged, give another one"
    )
