"""Placeholder tokens in prompts: ids that are looked up in a token bank, for one call of a text encoder at a time.

Nothing of a shared model changes when a bank is used. Tokenizers are copied before placeholders are added, and the
encoder's input embedding keeps its table and its parameter. A hook on it answers placeholder positions from the bank
while :func:`learned_embeddings` is in effect, which holds for the calling thread alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenlearn.errors import UserError
from tokenlearn.tokens.bank import TokenBank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Lookup(NamedTuple):
    """Rows (B, L) of a bank, -1 for words, and the bank's vectors (V, width)."""

    rows: Tensor
    vectors: Tensor


_LOOKUP: ContextVar[_Lookup | None] = ContextVar("learned_embeddings", default=None)


def input_embedding(text_encoder: nn.Module) -> nn.Embedding:
    """Input embedding of a ``transformers`` text encoder, wherever its version keeps it."""
    return cast(nn.Embedding, cast(Any, text_encoder).get_input_embeddings())


def accept_learned_embeddings(text_encoder: nn.Module) -> None:
    """Let a text encoder read placeholder positions from :func:`learned_embeddings`; words stay as they are.

    The encoder's embedding treats words as before, with Gemma's scaling for example.
    """
    weight = input_embedding(text_encoder).weight
    for module in text_encoder.modules():
        # T5 reads through a second module that shares the table's parameter.
        if isinstance(module, nn.Embedding) and module.weight is weight:
            module.register_forward_hook(_answer_placeholders)


def _answer_placeholders(module: nn.Module, inputs: tuple[Tensor, ...], words: Tensor) -> Tensor | None:
    if (lookup := _LOOKUP.get()) is None:
        return None
    vectors = functional.embedding(lookup.rows.clamp_min(0), lookup.vectors.to(words))
    return torch.where((lookup.rows >= 0)[..., None], vectors, words)


@contextmanager
def learned_embeddings(rows: Tensor, vectors: Tensor) -> Iterator[None]:
    """While the calling thread's text encoder reads placeholder positions from vectors.

    Args:
        rows: (B, L) row of ``vectors`` at each position of the ids, -1 for words.
        vectors: (V, width), differentiable.
    """
    token = _LOOKUP.set(_Lookup(rows, vectors))
    try:
        yield
    finally:
        _LOOKUP.reset(token)


class PlaceholderVocabulary:
    """Tokenizers that know the placeholders of a bank besides their words.

    The units of the placeholders of the input space are added to copies of the tokenizers. Words keep their ids.
    Placeholders of the output space are no part of what is tokenized, see :meth:`without_outputs`.

    Args:
        bank: token bank.
        tokenizers: one per text encoder.

    Attributes:
        tokenizers: the copies.
        outputs: placeholders of the output space.

    Raises:
        UserError: if the bank is for another number of text encoders, a placeholder means something already, or a
            tokenizer does not keep it as one unit.
    """

    def __init__(self, bank: TokenBank, tokenizers: Sequence[PreTrainedTokenizerBase]) -> None:
        if len(bank.embedding_widths) != len(tokenizers):
            raise UserError(
                f"the embedding is for {len(bank.embedding_widths)} text encoder(s), this backbone has "
                f"{len(tokenizers)}; use one that was made for this model family"
            )
        inputs, self.outputs = bank.input_placeholders, bank.output_placeholders
        units = [unit for placeholder in inputs for unit in bank.unit_names(placeholder)]
        for tokenizer in tokenizers:
            _check_new(tokenizer, [*units, *self.outputs])
        self.tokenizers = [copy.deepcopy(tokenizer) for tokenizer in tokenizers]
        self._ids = [
            torch.tensor(_add_units(tokenizer, units), dtype=torch.long) if units else torch.empty(0, dtype=torch.long)
            for tokenizer in self.tokenizers
        ]
        self._rows = torch.tensor(
            [row for name in inputs for row in range(bank.rows(name).start, bank.rows(name).stop)], dtype=torch.long
        )
        # Longest first: a unit before the placeholder it starts with, and a whole expansion before its first unit.
        expansions = {name: " ".join(bank.unit_names(name)) for name in inputs}
        self._expansions = {name.casefold(): expansion for name, expansion in expansions.items()}
        texts = sorted({*units, *expansions.values()}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(_whole_word, texts)), re.IGNORECASE)
        self._output_pattern = re.compile(rf"\s*({'|'.join(map(_whole_word, self.outputs))})", re.IGNORECASE)

    def expand(self, prompt: str) -> str:
        """Replace each placeholder by its units, ``<wizard>`` by ``<wizard> <wizard>_1 ...``.

        Upper and lower case are the same, because CLIP's tokenizers lower prompts first. A single unit such as
        ``<wizard>_1``, and units that are written out in full already, stay as they are: expanding twice is expanding
        once.

        Args:
            prompt: any text.

        Returns:
            The prompt that :attr:`tokenizers` split into one id per vector.
        """

        def expansion(found: re.Match[str]) -> str:
            return self._expansions.get(found[0].casefold(), found[0])

        return self._pattern.sub(expansion, prompt) if self._expansions else prompt

    def without_outputs(self, prompt: str) -> tuple[str, list[int]]:
        """Take the placeholders of the output space out of a prompt, with the white space before them.

        Args:
            prompt: any text.

        Returns:
            The rest of the prompt, and how often each of :attr:`outputs` stood in it.
        """
        if not self.outputs:
            return prompt, []
        found = [match.casefold() for match in self._output_pattern.findall(prompt)]
        counts = [found.count(name.casefold()) for name in self.outputs]
        return (self._output_pattern.sub("", prompt).strip(), counts) if found else (prompt, counts)

    def rows(self, ids: Tensor, encoder_index: int) -> Tensor:
        """Row (B, L) of the bank's vectors for each of the ids (B, L), -1 for words."""
        if not len(self._rows):
            return torch.full_like(ids, -1)
        matches = ids[..., None] == self._ids[encoder_index].to(ids.device)
        return torch.where(matches.any(dim=-1), self._rows.to(ids.device)[matches.int().argmax(dim=-1)], -1)


def _whole_word(name: str) -> str:
    """Pattern of a name where it is no part of a longer word; brackets end a word themselves."""
    before = r"(?<!\w)" if name[0].isalnum() or name[0] == "_" else ""
    after = r"(?!\w)" if name[-1].isalnum() or name[-1] == "_" else ""
    return f"{before}{re.escape(name)}{after}"


def _check_new(tokenizer: PreTrainedTokenizerBase, units: Iterable[str]) -> None:
    """Raise UserError when a unit is in the vocabulary, in its own spelling or as the tokenizer spells it."""
    vocabulary = tokenizer.get_vocab()
    for unit in units:
        ids = tokenizer(unit, add_special_tokens=False).input_ids
        if unit in vocabulary or (len(ids) == 1 and ids[0] != tokenizer.unk_token_id):
            raise UserError(
                f"placeholder token '{unit}' is already in the text encoder's vocabulary; choose another, such as "
                f"'<my-{unit.strip('<>')}>'"
            )


def _add_units(tokenizer: PreTrainedTokenizerBase, units: list[str]) -> list[int]:
    """Add units and return their ids; UserError when the tokenizer splits one of them."""
    from transformers import AddedToken

    # A unit without brackets must stand alone: "ngd" is no part of "kingdom".
    tokenizer.add_tokens([AddedToken(unit, single_word=unit[0] != "<", normalized=True) for unit in units])
    ids = cast(list[int], tokenizer.convert_tokens_to_ids(units))
    for unit, unit_id in zip(units, ids, strict=True):
        found = tokenizer(unit, add_special_tokens=False).input_ids
        if found != [unit_id]:
            raise UserError(
                f"placeholder token '{unit}' is split into {len(found)} units by this tokenizer; choose a plain one "
                "in lower-case letters, such as '<wizard>'"
            )
    return ids
