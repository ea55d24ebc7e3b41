"""Strengths of embeddings in prompts of ComfyUI, for text encoders that ignore its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from tokenlearn.errors import UserError

Tokens = Mapping[str, list[list[tuple[Any, ...]]]]
"""ComfyUI's tokens: by text encoder, batches of a unit, which is an id or an embedding's vector, and its weight."""

_MARKED = re.compile(r"(?<!\S)embedding:(?P<name>[^\s*<\[,]+)(?:\*(?P<strength>[+-]?\d+(?:\.\d+)?|\S+))?")


class Clip(Protocol):
    """ComfyUI's CLIP, which stands for any text encoders with their tokenizers."""

    def tokenize(self, text: str) -> Tokens:
        """Tokens of a prompt."""

    def encode_from_tokens_scheduled(self, tokens: Tokens) -> Any:  # noqa: ANN401 - ComfyUI's conditioning
        """Conditioning of tokens."""


def tokenize_with_strengths(clip: Clip, text: str) -> Tokens:
    """Tokens of a prompt in which ``embedding:name*1.5`` has the vectors of an embedding times 1.5.

    The strength is a factor on the vectors, as that of ``tokenlearn export --scale``. It takes effect in all text
    encoders, unlike the weights ``(embedding:name:1.5)``, which those of FLUX.2, Klein and others ignore.

    Args:
        clip: ComfyUI's CLIP.
        text: prompt; embeddings without a strength have strength 1.

    Raises:
        UserError: if a strength is no number, an embedding is in no folder of ComfyUI, or has no vectors for any of
            the text encoders.
    """
    strengths: list[tuple[str, float]] = []
    for found in _MARKED.finditer(text):
        try:
            strengths.append((found["name"], float(found["strength"] or 1)))
        except ValueError:
            raise UserError(
                f"'{found[0]}' has the strength '{found['strength']}'; write a number, as in "
                f"embedding:{found['name']}*1.5"
            ) from None
    tokens = clip.tokenize(_MARKED.sub(r"embedding:\g<name>", text))
    if all(strength == 1 for _, strength in strengths):
        return tokens
    counts = {name: _vectors(clip.tokenize(f"embedding:{name}")) for name in dict(strengths)}
    for name, by_encoder in counts.items():
        if not any(by_encoder.values()):
            raise UserError(
                f"ComfyUI found no vectors of embedding:{name} for these text encoders; put its file into "
                "models/embeddings, and write its name with upper and lower case as it is"
            )
    return {
        encoder: _scaled(
            batches, [strength for name, strength in strengths for _ in range(counts[name][encoder])], encoder
        )
        for encoder, batches in tokens.items()
    }


def _vectors(tokens: Tokens) -> dict[str, int]:
    """Number of vectors among the tokens of each text encoder."""
    return {
        encoder: sum(isinstance(unit[0], torch.Tensor) for batch in batches for unit in batch)
        for encoder, batches in tokens.items()
    }


def _scaled(batches: list[list[tuple[Any, ...]]], factors: list[float], encoder: str) -> list[list[tuple[Any, ...]]]:
    """Batches with each vector times its factor."""
    count = sum(isinstance(unit[0], torch.Tensor) for batch in batches for unit in batch)
    if count != len(factors):
        raise UserError(
            f"the prompt has {count} vectors of embeddings for {encoder}, expected {len(factors)}; write "
            "embedding:name after a space, and weights such as (words:1.2) around other words only"
        )
    remaining = iter(factors)
    return [
        [(unit[0] * next(remaining), *unit[1:]) if isinstance(unit[0], torch.Tensor) else unit for unit in batch]
        for batch in batches
    ]
