"""Word embeddings of a model folder as arrays, without torch: for norms and nearest words of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tokenlearn.errors import UserError
from tokenlearn.tokens.files.safetensors_files import Array, read_arrays

_TABLES = ("token_embedding.weight", "shared.weight", "embed_tokens.weight")
_ROWS_AT_ONCE = 8192
_MOST_WORDS = 10**6


class VocabularyTable:
    """Words of a text encoder with their embeddings.

    Attributes:
        rows: (V, width) embeddings in the precision of the file.
        words: id to word, for words that stand alone.
    """

    def __init__(self, rows: Array, words: dict[int, str]) -> None:
        self.rows, self.words = rows, words

    def norms(self, quantiles: tuple[float, float] = (0.01, 0.99)) -> tuple[float, float]:
        """Range of the L2 norms of nearly all words."""
        norms = np.concatenate([np.linalg.norm(part, axis=1) for part in self._parts()])
        low, high = np.quantile(norms, quantiles)
        return float(low), float(high)

    def nearest(self, vector: Array, count: int) -> list[tuple[str, float]]:
        """The whole words of largest cosine to a vector (width,), with the cosine."""
        length = float(np.linalg.norm(vector)) or 1.0
        cosines = np.concatenate(
            [part @ vector / np.maximum(np.linalg.norm(part, axis=1) * length, 1e-12) for part in self._parts()]
        )
        order = (int(index) for index in np.argsort(-cosines, kind="stable"))
        found = [(self.words[index], float(cosines[index])) for index in order if index in self.words]
        return found[:count]

    def _parts(self) -> Iterator[Array]:
        for start in range(0, len(self.rows), _ROWS_AT_ONCE):
            yield self.rows[start : start + _ROWS_AT_ONCE].astype(np.float32)


def vocabulary_tables(model: Path) -> list[VocabularyTable]:
    """The tables of a model's text encoders, in their order.

    Args:
        model: folder of a diffusers pipeline.

    Raises:
        UserError: if it has no text encoder with safetensors weights, or no vocabulary.
    """
    tables = []
    for number in ("", "_2", "_3"):
        folder = model / f"text_encoder{number}"
        if folder.is_dir():
            tables.append(VocabularyTable(_rows(folder), _words(model / f"tokenizer{number}")))
    if not tables:
        raise UserError(f"'{model}' has no folder text_encoder; name the folder of a diffusers pipeline")
    return tables


def _rows(folder: Path) -> Array:
    for path in sorted(folder.glob("*.safetensors")):
        arrays, _ = read_arrays(path, lambda keys: [key for key in keys if key.endswith(_TABLES)][:1])
        for array in arrays.values():
            if isinstance(array, np.ndarray) and array.ndim == 2:
                return array
    raise UserError(f"'{folder}' has no safetensors file with word embeddings; save the model as safetensors")


def _words(folder: Path) -> dict[int, str]:
    """Whole words by id: those that end a word (CLIP), or begin one (T5, Gemma, Qwen)."""
    try:
        plain = folder / "vocab.json"
        if plain.is_file():
            vocabulary = json.loads(plain.read_text(encoding="utf-8"))
        else:
            vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        if isinstance(vocabulary, list):  # of T5: pairs of unit and score, in the order of ids
            vocabulary = {unit: index for index, (unit, _) in enumerate(vocabulary)}
        pairs = list(vocabulary.items())[:_MOST_WORDS]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{folder}' has no vocabulary that can be read ({type(error).__name__}); save it anew"
        ) from None
    words = {}
    for unit, index in pairs:
        word = unit.removesuffix("</w>") if unit.endswith("</w>") else unit[1:] if unit[:1] in "▁Ġ" else ""
        if word.isalpha():
            words[int(index)] = word
    return words
