"""Starting vectors of tokens from words, and the range of norms of a vocabulary."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tokenlearn.errors import UserError
from tokenlearn.tokens.injection import input_embedding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKEN = re.compile(r"<[^<>\s]+>")


@torch.no_grad()
def vectors_from_words(
    words: str, tokenizer: PreTrainedTokenizerBase, text_encoder: nn.Module, num_vectors: int | None = None
) -> Tensor:
    """Input embeddings of one or several words.

    Args:
        words: text such as ``"striped tiger cat"``, or ``"a"``, the start of discriminative class tokens
            (https://arxiv.org/abs/2303.17155), which reproduces the prompt without the token exactly.
        tokenizer: the text encoder's tokenizer.
        text_encoder: text encoder whose input embedding is read.
        num_vectors: number of vectors. None or the number of vocabulary units in ``words`` gives one vector per unit,
            1 gives their mean, and a larger number repeats them in turn.

    Returns:
        (n, width) float32 copies, without gradient.

    Raises:
        UserError: if ``words`` is empty, a token or unknown to the vocabulary, or ``num_vectors`` is below 1 or
            between 1 and the number of units.
    """
    if (token := _TOKEN.search(words)) is not None:
        raise UserError(
            f"cannot start a token from '{words}', because '{token[0]}' is no word; name words, or give the file of "
            "the token in tokens.initial_embeddings"
        )
    ids = tokenizer(words, add_special_tokens=False).input_ids
    if not ids or tokenizer.unk_token_id in ids:
        raise UserError(
            f"cannot start a token from '{words}', which is not in the text encoder's vocabulary; name another word"
        )
    embedding = input_embedding(text_encoder)
    vectors: Tensor = embedding(torch.tensor(ids, device=embedding.weight.device)).float()
    if num_vectors is None or num_vectors == len(ids):
        return vectors.clone()
    if num_vectors == 1:
        return vectors.mean(dim=0, keepdim=True)
    if num_vectors < len(ids):
        raise UserError(
            f"cannot share the {len(ids)} units of '{words}' among {num_vectors} vectors; ask for 1 vector (their "
            f"mean), {len(ids)} or more"
        )
    return vectors[torch.arange(num_vectors, device=vectors.device) % len(ids)]


@torch.no_grad()
def vocabulary_norm_range(
    text_encoder: nn.Module, quantiles: tuple[float, float] = (0.01, 0.99)
) -> tuple[float, float]:
    """Range of the L2 norms of nearly all words of the vocabulary.

    Args:
        text_encoder: text encoder whose input embedding is read.
        quantiles: lower and upper quantile in [0, 1]; the default leaves out rows that training hardly changed.

    Returns:
        Smallest and largest norm.
    """
    norms = input_embedding(text_encoder).weight.float().norm(dim=1)
    low, high = torch.quantile(norms, norms.new_tensor(quantiles)).tolist()
    return low, high
