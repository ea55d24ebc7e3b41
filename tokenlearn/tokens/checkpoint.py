"""What a checkpoint says about its tokens, readable without the task that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenlearn.errors import UserError

CHECKPOINT_KEY = "tokenlearn"
"""Key of the entry about tokens, which has base_model, vocabulary_hash, num_vectors, embedding_widths and metadata.

It also has spaces, without which all tokens are of the input space, as in version 0.1.0.
"""


def checkpoint_about(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a checkpoint about its tokens.

    Raises:
        UserError: if the checkpoint holds no learned tokens.
    """
    if CHECKPOINT_KEY not in checkpoint or not any(key.startswith("bank.") for key in checkpoint["state_dict"]):
        raise UserError("the checkpoint holds no learned tokens; give one that 'tokenlearn fit' wrote")
    about: dict[str, Any] = checkpoint[CHECKPOINT_KEY]
    return about
