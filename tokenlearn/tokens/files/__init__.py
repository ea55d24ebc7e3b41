"""Embedding files, one module per family of programs."""

from tokenlearn.tokens.files.base import (
    EmbeddingFile,
    EmbeddingFormat,
    add_metadata,
    embedding_file_name,
    load_embedding,
    save_embedding,
)

__all__ = [
    "EmbeddingFile",
    "EmbeddingFormat",
    "add_metadata",
    "embedding_file_name",
    "load_embedding",
    "save_embedding",
]
