"""OneTrainer: ``emp_params``, the only key that it reads; the token is a setting of the program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tokenlearn.errors import UserError
from tokenlearn.tokens.files.family import Found

KEY = "emp_params"


def tensors(token: str, vectors: Sequence[Tensor]) -> dict[str, Tensor]:
    """See :class:`tokenlearn.tokens.files.family.Family`."""
    return {KEY: vectors[0]}


def find(keys: frozenset[str], source: Path) -> Found | None:
    """See :class:`tokenlearn.tokens.files.family.Family`.

    Raises:
        UserError: for vectors of the text encoder's output, which prompts cannot hold.
    """
    if outputs := sorted(key for key in keys if key.endswith("_out")):
        raise UserError(
            f"'{source}' has vectors for the text encoder's output ({', '.join(outputs)}), which no prompt can hold; "
            "train and export it without output embeddings"
        )
    return Found((KEY,)) if keys == {KEY} else None
