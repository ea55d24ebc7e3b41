"""What a checkpoint says about its tokens, readable without the task that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokenlearn.errors import UserError

CHECKPOINT_KEY = "tokenlearn"
"""Key of the entry about tokens, which has base_model, vocabulary_hash, num_vectors, embedding_widths and metadata."""

_TRAINING_STATE = ("loops", "optimizer_states")


def read_checkpoint(path: str | Path, training: bool = False) -> dict[str, Any]:
    """A whole checkpoint on the CPU. No code in it runs.

    Args:
        path: file that ``tokenlearn fit`` wrote.
        training: whether a fit is to continue from it.

    Raises:
        UserError: if there is no such file, it cannot be read, it holds no learned tokens, or it lacks the state of
            the training that is asked for.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "not a file" if file.exists() else "no such file"
        raise UserError(f"no checkpoint at '{path}' ({kind}); give a .ckpt file that 'tokenlearn fit' wrote")
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise errors of any kind
        raise UserError(f"checkpoint '{path}' cannot be read ({type(error).__name__}); it may be truncated") from error
    try:
        about = checkpoint_about(checkpoint)
    except UserError as error:
        raise UserError(f"'{path}': {error}") from None
    if not _agrees(about, checkpoint["state_dict"]):
        raise UserError(f"checkpoint '{path}' is damaged: its vectors do not fit its list of tokens; give another one")
    if training and any(name not in checkpoint for name in _TRAINING_STATE):
        raise UserError(
            f"checkpoint '{path}' has tokens but no state of a training; start from the tokens instead: export them, "
            "and set model.tokens.initial_embeddings"
        )
    return checkpoint


def checkpoint_about(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a checkpoint about its tokens.

    Raises:
        UserError: if the checkpoint holds no learned tokens.
    """
    state = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    holds = isinstance(state, Mapping) and any(str(key).startswith("bank.") for key in state)
    if not holds or not isinstance(checkpoint.get(CHECKPOINT_KEY), Mapping):
        raise UserError("the checkpoint holds no learned tokens; give one that 'tokenlearn fit' wrote")
    about: dict[str, Any] = checkpoint[CHECKPOINT_KEY]
    return about


def _agrees(about: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """Whether the entry about tokens is whole and describes the vectors of the state."""
    try:
        rows, widths = sum(about["num_vectors"].values()), list(about["embedding_widths"])
        shapes = [tuple(state[f"bank.vectors.{index}"].shape) for index in range(len(widths))]
        named = set(about["num_vectors"]) <= set(about["metadata"]) and isinstance(about["vocabulary_hash"], str)
        return named and "base_model" in about and shapes == [(rows, width) for width in widths]
    except (KeyError, TypeError, AttributeError):
        return False
