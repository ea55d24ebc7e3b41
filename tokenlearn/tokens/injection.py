"""Placeholder tokens in prompts: ids of their own that are looked up in the token bank."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenlearn.errors import UserError
from tokenlearn.tokens.bank import TokenBank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def input_embedding(text_encoder: nn.Module) -> nn.Embedding:
    """Input embedding of a ``transformers`` text encoder, wherever its version keeps it."""
    return cast(nn.Embedding, cast(Any, text_encoder).get_input_embeddings())


class InjectedEmbedding(nn.Embedding):
    """An input embedding that answers the ids of placeholders from a token bank and all others from its table.

    It shares the table's parameter and keeps its name, so the encoder's state dict is unchanged; the bank is not a
    submodule, so its vectors are listed once, by whoever trains them.

    Args:
        table: the embedding to stand in for.
        bank: token bank.
        encoder_index: which of the bank's parameters is for this text encoder.
        unit_ids: vocabulary ids of the bank's rows, in their order.
    """

    rows: Tensor

    def __init__(self, table: nn.Embedding, bank: TokenBank, encoder_index: int, unit_ids: Sequence[int]) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, table.padding_idx, _weight=table.weight.data)
        self.weight = table.weight
        self.train(table.training)
        self._bank = (bank,)  # in a tuple, which nn.Module does not register
        self.encoder_index = encoder_index
        rows = torch.full((max(table.num_embeddings, max(unit_ids) + 1),), -1, device=table.weight.device)
        rows[list(unit_ids)] = torch.arange(len(unit_ids), device=rows.device)
        self.register_buffer("rows", rows, persistent=False)  # id to row of the bank, -1 for words

    def forward(self, input: Tensor) -> Tensor:
        """Look up ids.

        Args:
            input: (...) ids of words and placeholders.

        Returns:
            (..., width) embeddings in the table's dtype.
        """
        rows = self.rows[input]
        learned = rows >= 0
        words = super().forward(input.masked_fill(learned, 0))
        vectors = self._bank[0].vectors[self.encoder_index].to(words)
        return torch.where(learned[..., None], functional.embedding(rows.clamp_min(0), vectors), words)


class TokenInjection:
    """Make tokenizers and text encoders understand the placeholders of a token bank.

    The units of all placeholders are added to each tokenizer, and each encoder's input embedding is replaced by an
    :class:`InjectedEmbedding`. No table is resized, and every word keeps its row, bit for bit.

    Args:
        bank: token bank; it is read at each use, so later changes of its vectors take effect.
        tokenizers: one per text encoder.
        text_encoders: ``transformers`` text encoders, in the order of the bank's widths.

    Raises:
        UserError: if a width does not fit its encoder, a placeholder means something already, or a tokenizer does not
            keep it as one unit. Tokenizers and encoders are left as they were.
        ValueError: if an encoder has an injection already; remove that first.
    """

    def __init__(
        self, bank: TokenBank, tokenizers: Sequence[PreTrainedTokenizerBase], text_encoders: Sequence[nn.Module]
    ) -> None:
        if not len(bank.embedding_widths) == len(tokenizers) == len(text_encoders):
            raise UserError(
                f"the embedding is for {len(bank.embedding_widths)} text encoder(s), this backbone has "
                f"{len(text_encoders)} with {len(tokenizers)} tokenizer(s)"
            )
        tables = [input_embedding(text_encoder) for text_encoder in text_encoders]
        for table, width in zip(tables, bank.embedding_widths, strict=True):
            if isinstance(table, InjectedEmbedding):
                raise ValueError("the text encoder has a token injection already; call its remove() first")
            if table.embedding_dim != width:
                raise UserError(
                    f"the embedding has width {width}, this backbone's text encoder has {table.embedding_dim}; "
                    "use one that was made for this model family"
                )
        units = [unit for placeholder in bank.placeholders for unit in bank.unit_names(placeholder)]
        for tokenizer in tokenizers:
            _check_new(tokenizer, units)

        self.bank = bank
        self.tokenizers = list(tokenizers)
        self.text_encoders = list(text_encoders)
        self._units = units
        self._tables = tables
        # Longest first: a unit before the placeholder it starts with, and a whole expansion before its first unit.
        expansions = {name: " ".join(bank.unit_names(name)) for name in bank.placeholders}
        self._expansions = {name.casefold(): expansion for name, expansion in expansions.items()}
        texts = sorted({*units, *expansions.values()}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts)), re.IGNORECASE)

        try:
            ids = [_add_units(tokenizer, units) for tokenizer in tokenizers]
        except UserError:
            self.remove()
            raise
        for index, text_encoder in enumerate(text_encoders):
            injected = InjectedEmbedding(tables[index], bank, index, ids[index])
            cast(Any, text_encoder).set_input_embeddings(injected)

    def expand(self, prompt: str) -> str:
        """Replace each placeholder by its units, ``<wizard>`` by ``<wizard> <wizard>_1 ...``.

        Upper and lower case are the same, because CLIP's tokenizers lower prompts first. A unit of its own such as
        ``<wizard>_1``, and units that are written out in full already, stay as they are: expanding twice is expanding
        once.

        Args:
            prompt: any text.

        Returns:
            The prompt that the tokenizers of this injection split into one id per vector.
        """

        def expansion(found: re.Match[str]) -> str:
            return self._expansions.get(found[0].casefold(), found[0])

        return self._pattern.sub(expansion, prompt)

    def remove(self) -> None:
        """Give encoders their embeddings and tokenizers their vocabulary back; doing so again changes nothing."""
        for text_encoder, table in zip(self.text_encoders, self._tables, strict=True):
            current = input_embedding(text_encoder)
            if isinstance(current, InjectedEmbedding) and current._bank[0] is self.bank:
                table.weight = current.weight  # a conversion in between may have made a new parameter
                cast(Any, text_encoder).set_input_embeddings(table)
        for tokenizer in self.tokenizers:
            _remove_units(tokenizer, self._units)


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
    """Add units and return their ids; UserError when the tokenizer does not keep one of them whole."""
    tokenizer.add_tokens(units)
    ids = cast(list[int], tokenizer.convert_tokens_to_ids(units))
    for unit, unit_id in zip(units, ids, strict=True):
        found = tokenizer(unit, add_special_tokens=False).input_ids
        if found != [unit_id]:
            raise UserError(
                f"placeholder token '{unit}' is split into {len(found)} units by this tokenizer; choose a plain one "
                "in lower-case letters, such as '<wizard>'"
            )
    return ids


def _remove_units(tokenizer: Any, units: Iterable[str]) -> None:  # noqa: ANN401 - reaches into both kinds of tokenizer
    """Undo ``add_tokens``, for which ``transformers`` has no public call."""
    removed = set(units)
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in removed]
        tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
        if hasattr(tokenizer, "_wrap_decode_method_backend_tokenizer"):  # CLIP patches the object just replaced
            tokenizer._wrap_decode_method_backend_tokenizer()
        return
    for unit in removed & set(tokenizer._added_tokens_encoder):
        del tokenizer._added_tokens_decoder[tokenizer._added_tokens_encoder.pop(unit)]
    tokenizer.tokens_trie = type(tokenizer.tokens_trie)()
    tokenizer._update_trie()
    tokenizer._update_total_vocab_size()
