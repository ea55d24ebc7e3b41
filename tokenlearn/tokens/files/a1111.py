"""AUTOMATIC1111, ComfyUI, InvokeAI and kohya: ``emb_params``; the token in prompts is the file's name.

AUTOMATIC1111's own trainings are pickles of another form: ``string_to_param`` and ``name``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokenlearn.tokens.files.family import Content, Found

KEY = "emb_params"
_METADATA = ("name", "step", "sd_checkpoint", "sd_checkpoint_name")


def tensors(token: str, vectors: Sequence[Tensor]) -> dict[str, Tensor]:
    """See :class:`tokenlearn.tokens.files.family.Family`."""
    return {KEY: vectors[0]}


def find(keys: frozenset[str], source: Path) -> Found | None:
    """See :class:`tokenlearn.tokens.files.family.Family`."""
    return Found((KEY,)) if keys == {KEY} else None


def is_training(content: Mapping[Any, Any]) -> bool:
    """Whether a pickle is of AUTOMATIC1111's training."""
    return "string_to_param" in content


def read_training(content: Mapping[Any, Any]) -> Content:
    """The content of a pickle of AUTOMATIC1111's training."""
    metadata = {key: str(content[key]) for key in _METADATA if isinstance(content.get(key), str | int | float)}
    stored = content["string_to_param"]
    params = dict(stored.items()) if isinstance(stored, Mapping | nn.ParameterDict) else {}
    # The key is "*" in all but a few old files; programs that read those take the first.
    vectors = {KEY: params.get("*", next(iter(params.values())))} if params else {}
    return Content(vectors, metadata, metadata.get("name"))
