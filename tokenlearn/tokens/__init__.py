"""Learned tokens: bank, their place in prompts, their start and their files."""

from tokenlearn.tokens.bank import Space, TokenBank
from tokenlearn.tokens.class_initialisation import (
    ClassInitialiser,
    class_vectors,
    whole_words,
    with_vectors,
    word_ids,
)
from tokenlearn.tokens.embeddings import Embeddings, LearnedTokens, load_bank, load_embeddings
from tokenlearn.tokens.files import (
    EmbeddingFile,
    EmbeddingFormat,
    embedding_file_name,
    load_embedding,
    save_embedding,
)
from tokenlearn.tokens.initialisation import vectors_from_words, vocabulary_norm_range
from tokenlearn.tokens.injection import PlaceholderVocabulary, input_embedding
from tokenlearn.tokens.vocabulary import vocabulary_hash

__all__ = [
    "ClassInitialiser",
    "EmbeddingFile",
    "EmbeddingFormat",
    "Embeddings",
    "LearnedTokens",
    "PlaceholderVocabulary",
    "Space",
    "TokenBank",
    "class_vectors",
    "embedding_file_name",
    "input_embedding",
    "load_bank",
    "load_embedding",
    "load_embeddings",
    "save_embedding",
    "vectors_from_words",
    "vocabulary_hash",
    "vocabulary_norm_range",
    "whole_words",
    "with_vectors",
    "word_ids",
]
