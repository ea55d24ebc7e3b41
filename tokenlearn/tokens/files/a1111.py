"""AUTOMATIC1111, ComfyUI, InvokeAI and kohya: ``emb_params``; the token in prompts is the file's name.

AUTOMATIC1111's own trainings are of another form, in pickles and in images: ``string_to_param`` and ``name``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenlearn.tokens.files.family import Content, Found, wrapped
from tokenlearn.tokens.files.safetensors_files import Array

KEY = "emb_params"
_METADATA = ("name", "step", "sd_checkpoint", "sd_checkpoint_name")


def arrays(token: str, vectors: Sequence[Array]) -> dict[str, Array]:
    """See :class:`tokenlearn.tokens.files.family.Writer`."""
    return {KEY: vectors[0]}


def find(keys: frozenset[str], source: Path) -> list[Found]:
    """See :class:`tokenlearn.tokens.files.family.Reader`."""
    return [Found((KEY,))] if keys == {KEY} else []


def is_training(content: Mapping[Any, Any]) -> bool:
    """Whether a pickle or an image is of AUTOMATIC1111's training."""
    return "string_to_param" in content


def read_training(content: Mapping[Any, Any], terms: object) -> Content:
    """The content of AUTOMATIC1111's training.

    Args:
        content: the whole content.
        terms: its ``string_to_param``, as a mapping if it is one. One term is the file's token, whatever its key,
            which is ``*`` in all but a few old files. Several are tokens of their own.
    """
    metadata = {key: str(content[key]) for key in _METADATA if isinstance(content.get(key), str | int | float)}
    if not isinstance(terms, Mapping):
        return Content({}, metadata)
    if len(terms) == 1:
        return Content({KEY: next(iter(terms.values()))}, metadata)
    return Content({wrapped(str(term)): vectors for term, vectors in terms.items()}, metadata)
