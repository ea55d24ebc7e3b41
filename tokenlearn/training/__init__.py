"""Tasks that learn tokens."""

from tokenlearn.training.base import TokenTraining, adamw, check_gradient
from tokenlearn.training.caso import Caso
from tokenlearn.training.caso_edit import TrainingEdit
from tokenlearn.training.caso_initialisation import Initialisation
from tokenlearn.training.class_tokens import ClassTokens
from tokenlearn.training.textual_inversion import TextualInversion
from tokenlearn.training.word_search import WordSearch, find_words

__all__ = [
    "Caso",
    "ClassTokens",
    "Initialisation",
    "TextualInversion",
    "TokenTraining",
    "TrainingEdit",
    "WordSearch",
    "adamw",
    "check_gradient",
    "find_words",
]
