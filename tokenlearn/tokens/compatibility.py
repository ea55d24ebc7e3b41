"""Whether tokens fit a model: by the words beside which they were learned, compared with the model's words.

A token is a point among the words of a text encoder. Fine-tuned encoders have moved their words a little, other
encoders of the same width have different ones, and the token's file says how its words were: a small sketch of the
rows of those that matter, its nearest words and those of its name, whose cosine with a model's rows can be told.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenlearn.errors import shown
from tokenlearn.notices import is_first_process, notice, warn_once
from tokenlearn.tokens.files.safetensors_files import Array
from tokenlearn.tokens.injection import input_embedding
from tokenlearn.tokens.vocabulary import vocabulary_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARY = "vocabulary"
"""Entry of a file's metadata with hash and sketches of words of each text encoder, as JSON."""

CLOSE = 0.9
"""Mean cosine of words from which on two vocabularies are taken for one that was trained on."""

_SAME = 0.9995  # as of one table in single and in half precision
_NUMBERS = 64  # of a sketch; the cosine of two of them is right within about (1 - cosine^2) / 8
_NEAREST = 3  # words of each vector
_MOST_WORDS = 12
_COMMON = ("a", "photo", "person", "the")
_ROWS_AT_ONCE = 8192


class WordTable:
    """The words of a text encoder.

    Args:
        name: name of the encoder in embedding files.
        tokenizer: its tokenizer.
        text_encoder: the encoder, whose words are not trained.

    Attributes:
        name: as given.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, text_encoder: nn.Module) -> None:
        self.name, self._tokenizer, self._text_encoder = name, tokenizer, text_encoder

    @cached_property
    def hash(self) -> str:
        """See :func:`tokenlearn.tokens.vocabulary_hash`."""
        return vocabulary_hash(self._text_encoder)

    def units(self, text: str) -> list[str]:
        """Units of the vocabulary that a text is made of."""
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        known = [index for index in ids if index != self._tokenizer.unk_token_id]
        return [str(unit) for unit in self._tokenizer.convert_ids_to_tokens(known)]

    @torch.no_grad()
    def nearest_units(self, vectors: Tensor, count: int) -> list[str]:
        """Units of largest cosine to any of some vectors (n, width), ``count`` for each, without repetition."""
        weight = input_embedding(self._text_encoder).weight
        rows = weight[: len(self._tokenizer)]  # T5's table has spare rows
        wanted = nn.functional.normalize(vectors.to(weight.device, torch.float32))
        parts = torch.split(rows, _ROWS_AT_ONCE)
        cosines = torch.cat([nn.functional.normalize(part.float()) @ wanted.T for part in parts])
        ids = cosines.topk(min(count, len(rows)), dim=0).indices.T.flatten().tolist()
        return [str(unit) for unit in self._tokenizer.convert_ids_to_tokens(list(dict.fromkeys(ids)))]

    @torch.no_grad()
    def sketches(self, units: Iterable[str]) -> dict[str, Array]:
        """Sketch (64,) int8 of the row of each unit that the vocabulary has."""
        vocabulary = self._tokenizer.get_vocab()
        weight = input_embedding(self._text_encoder).weight
        ids = {unit: vocabulary[unit] for unit in units if vocabulary.get(unit, len(weight)) < len(weight)}
        if not ids:
            return {}
        rows = weight[torch.tensor(list(ids.values()), device=weight.device)].to("cpu", torch.float64).numpy()
        projected = rows @ _signs(rows.shape[1])
        largest = np.abs(projected).max(axis=1, keepdims=True)
        whole = np.round(127 * projected / np.where(largest > 0, largest, 1)).astype(np.int8)
        return dict(zip(ids, whole, strict=True))


def fingerprint(tables: Sequence[WordTable], placeholder: str, vectors: Sequence[Tensor] = ()) -> str:
    """What a token's file says about the words beside which it was learned, for :data:`VOCABULARY`.

    Args:
        tables: words of each text encoder.
        placeholder: the token, whose letters are often the name of its class.
        vectors: (n, width) per text encoder; none for tokens that are not among the words.
    """
    entries = []
    for index, table in enumerate(tables):
        near = table.nearest_units(vectors[index].detach(), _NEAREST) if vectors else []
        named = table.units(" ".join(re.findall(r"[^\W\d_]+", placeholder)))
        units = dict.fromkeys([*named, *near, *(unit for word in _COMMON for unit in table.units(word))])
        sketches = table.sketches(list(units)[:_MOST_WORDS])
        words = {unit: base64.b64encode(sketch.tobytes()).decode() for unit, sketch in sketches.items()}
        entries.append({"encoder": table.name, "hash": table.hash, "words": words})
    return json.dumps(entries, ensure_ascii=False)


@dataclass(frozen=True)
class _Difference:
    """Another vocabulary than the model's.

    Attributes:
        cosine: mean cosine of the words that matter, of the encoder where it is lowest; None if the file has none.
        encoder: that encoder.
        words: number of words.
    """

    cosine: float | None
    encoder: str = ""
    words: int = 0


def _difference(about: Mapping[str, str], tables: Sequence[WordTable]) -> _Difference | None:
    """How a token's vocabulary differs; None if it does not, or nothing is known of it."""
    entries = _entries(about)
    if len(entries) != len(tables):
        hashes = {tables[0].hash, about.get("vocabulary_hash", tables[0].hash)}
        return _Difference(None) if len(hashes) > 1 else None
    found = []
    for entry, table in zip(entries, tables, strict=True):
        if entry.get("hash") == table.hash:
            continue
        stored = _stored_sketches(entry)
        here = table.sketches(stored)
        cosines = [_cosine(stored[unit], here[unit]) for unit in here]
        if not cosines:
            found.append(_Difference(None, table.name))
        elif (mean := float(np.mean(cosines))) < _SAME:
            found.append(_Difference(mean, table.name, len(cosines)))
    return min(found, key=lambda item: -2 if item.cosine is None else item.cosine, default=None)


def check_vocabularies(
    tokens: Iterable[tuple[str | Path | None, Mapping[str, str]]], tables: Sequence[WordTable]
) -> None:
    """Say where tokens were learned beside other words than a model's.

    The same words say nothing, in another precision too, and neither do files that know nothing of theirs. Words that
    have hardly moved are one notice, others a warning, with their mean cosine.

    Args:
        tokens: file or token, for messages, and its metadata.
        tables: words of each text encoder of the model.
    """
    close: list[tuple[str, Mapping[str, str], _Difference]] = []
    far: list[tuple[str, Mapping[str, str], _Difference]] = []
    for name, about in tokens:
        if (difference := _difference(about, tables)) is not None:
            is_close = difference.cosine is not None and difference.cosine >= CLOSE
            (close if is_close else far).append((f"'{name}'", about, difference))
    if close and is_first_process():
        names, model, least = _together(close)
        notice(
            f"{names} learned on {model}, whose words have hardly moved from there to this model (cosine "
            f"{least.cosine:.3f} of those that matter); this should work"
        )
    if far:
        names, model, least = _together(far)
        how = (
            "nothing says how much"
            if least.cosine is None
            else f"the cosine of the {least.words} that matter is {least.cosine:.2f} in {least.encoder}"
        )
        warn_once(
            f"{names} learned on {model}, whose text encoder differs from this model's: {how}. Images may not show "
            "what was learned; use that model, learn anew, or set check_vocabulary to false to silence this",
            stacklevel=3,
        )


def _together(items: Sequence[tuple[str, Mapping[str, str], _Difference]]) -> tuple[str, str, _Difference]:
    """Names, their models, and the largest difference, for a message of all."""
    more = f" and {len(items) - 1} more were" if len(items) > 1 else " was"
    models = dict.fromkeys(shown(about.get("base_model", "another model")) for _, about, _ in items)
    least = min((item for *_, item in items), key=lambda item: -2 if item.cosine is None else item.cosine)
    return f"{items[0][0]}{more}", ", ".join(list(models)[:3]), least


def _entries(about: Mapping[str, str]) -> list[dict[str, Any]]:
    """Entries of text encoders of metadata; none if these are of another kind, as those of foreign files can be."""
    try:
        entries = json.loads(about.get(VOCABULARY, "[]"))
    except (ValueError, RecursionError):
        return []
    known = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    return entries if known else []


def _stored_sketches(entry: Mapping[str, Any]) -> dict[str, Array]:
    words = entry.get("words")
    found: dict[str, Array] = {}
    for unit, text in list(words.items())[:_MOST_WORDS] if isinstance(words, dict) else []:
        try:
            numbers = np.frombuffer(base64.b64decode(text, validate=True), np.int8)
        except (ValueError, TypeError):
            continue
        if len(numbers) == _NUMBERS:
            found[unit] = numbers
    return found


def _cosine(one: Array, other: Array) -> float:
    first, second = one.astype(np.float64), other.astype(np.float64)
    lengths = float(np.linalg.norm(first)) * float(np.linalg.norm(second))
    return float(first @ second) / max(lengths, 1e-12)


def _signs(width: int) -> Array:
    """Signs (width, 64), the same everywhere and for ever, by which rows are projected."""
    bits = np.unpackbits(np.frombuffer(hashlib.shake_128(b"tokenlearn").digest(width * _NUMBERS // 8), np.uint8))
    signs: Array = bits.reshape(width, _NUMBERS).astype(np.float64) * 2 - 1
    return signs
