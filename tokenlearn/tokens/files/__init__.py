"""Embedding files, one module per family of programs. No module but ``pickles`` imports torch."""

from tokenlearn.tokens.files.base import (
    EmbeddingFile,
    EmbeddingFormat,
    add_metadata,
    load_embedding,
    read_tokens,
    save_embedding,
)
from tokenlearn.tokens.files.names import embedding_file_name

__all__ = [
    "EmbeddingFile",
    "EmbeddingFormat",
    "add_metadata",
    "embedding_file_name",
    "load_embedding",
    "read_tokens",
    "save_embedding",
]
