"""Tasks that learn tokens."""

from tokenlearn.training.base import TokenTraining, adamw

__all__ = ["TokenTraining", "adamw"]
