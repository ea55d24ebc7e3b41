"""Tasks that learn tokens."""

from tokenlearn.training.base import TokenTraining, adamw, check_gradient
from tokenlearn.training.class_tokens import ClassTokens
from tokenlearn.training.textual_inversion import TextualInversion
from tokenlearn.training.word_search import WordSearch, find_words

__all__ = [
    "ClassTokens",
    "TextualInversion",
    "TokenTraining",
    "WordSearch",
    "adamw",
    "check_gradient",
    "find_words",
]
