"""Learned tokens: bank, their place in prompts, their start and their files.

The names are imported when they are first used, because files are read and written without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenlearn.tokens.bank import TokenBank as TokenBank
    from tokenlearn.tokens.class_initialisation import ClassInitialiser as ClassInitialiser
    from tokenlearn.tokens.class_initialisation import class_vectors as class_vectors
    from tokenlearn.tokens.class_initialisation import whole_words as whole_words
    from tokenlearn.tokens.class_initialisation import with_vectors as with_vectors
    from tokenlearn.tokens.class_initialisation import word_ids as word_ids
    from tokenlearn.tokens.embeddings import Embeddings as Embeddings
    from tokenlearn.tokens.embeddings import LearnedTokens as LearnedTokens
    from tokenlearn.tokens.embeddings import load_bank as load_bank
    from tokenlearn.tokens.embeddings import load_embeddings as load_embeddings
    from tokenlearn.tokens.files import EmbeddingFile as EmbeddingFile
    from tokenlearn.tokens.files import EmbeddingFormat as EmbeddingFormat
    from tokenlearn.tokens.files import embedding_file_name as embedding_file_name
    from tokenlearn.tokens.files import load_embedding as load_embedding
    from tokenlearn.tokens.files import read_tokens as read_tokens
    from tokenlearn.tokens.files import save_embedding as save_embedding
    from tokenlearn.tokens.initialisation import vectors_from_words as vectors_from_words
    from tokenlearn.tokens.initialisation import vocabulary_norm_range as vocabulary_norm_range
    from tokenlearn.tokens.injection import PlaceholderVocabulary as PlaceholderVocabulary
    from tokenlearn.tokens.injection import input_embedding as input_embedding
    from tokenlearn.tokens.spaces import Space as Space
    from tokenlearn.tokens.vocabulary import vocabulary_hash as vocabulary_hash

_NAMES = {
    "bank": "TokenBank",
    "class_initialisation": "ClassInitialiser class_vectors whole_words with_vectors word_ids",
    "embeddings": "Embeddings LearnedTokens load_bank load_embeddings",
    "files": "EmbeddingFile EmbeddingFormat embedding_file_name load_embedding read_tokens save_embedding",
    "initialisation": "vectors_from_words vocabulary_norm_range",
    "injection": "PlaceholderVocabulary input_embedding",
    "spaces": "Space",
    "vocabulary": "vocabulary_hash",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:  # noqa: ANN401 - type checkers read the block above
    if name not in _MODULES:
        raise AttributeError(f"module 'tokenlearn.tokens' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"tokenlearn.tokens.{_MODULES[name]}"), name)
    return value
