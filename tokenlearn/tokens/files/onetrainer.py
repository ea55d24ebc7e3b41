"""OneTrainer: ``emp_params``, the only key that it reads; the token is a setting of the program.

Its output embeddings, with keys that end in ``_out``, take the place of the text encoder's output at the token's
position.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenlearn.tokens.files import encoder_keys
from tokenlearn.tokens.files.family import Found
from tokenlearn.tokens.files.safetensors_files import Array

KEY = "emp_params"
OUT = "_out"


def arrays(token: str, vectors: Sequence[Array]) -> dict[str, Array]:
    """See :class:`tokenlearn.tokens.files.family.Writer`."""
    return {KEY: vectors[0]}


def find(keys: frozenset[str], source: Path) -> list[Found]:
    """See :class:`tokenlearn.tokens.files.family.Reader`.

    Vectors of the output are taken if there are no others.
    """
    out = frozenset(key for key in keys if key.endswith(OUT))
    inputs, ignored = keys - out, tuple(sorted(out))
    if inputs:
        return [found._replace(ignored=ignored) for found in _of_inputs(inputs, source)] if out or KEY in keys else []
    suffixed = _of_inputs(frozenset(key.removesuffix(OUT) for key in out), source)
    return [
        found._replace(keys=tuple(f"{key}{OUT}" for key in found.keys), space="output_place") for found in suffixed
    ]


def _of_inputs(keys: frozenset[str], source: Path) -> list[Found]:
    return [Found((KEY,))] if keys == {KEY} else encoder_keys.find(keys, source)
