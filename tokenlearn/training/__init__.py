"""Tasks that learn tokens."""

from tokenlearn.training.base import TokenTraining, adamw
from tokenlearn.training.class_tokens import ClassTokens
from tokenlearn.training.word_search import WordSearch, find_words

__all__ = ["ClassTokens", "TokenTraining", "WordSearch", "adamw", "find_words"]
