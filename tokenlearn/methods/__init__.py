"""LightningModules, one per published method: thin wiring of the other packages."""

from tokenlearn.methods.base import TokenTask
from tokenlearn.methods.class_tokens import ClassTokens
from tokenlearn.methods.doodl import Doodl
from tokenlearn.methods.doodl_test import DoodlCase, DoodlTest
from tokenlearn.methods.edit import Edit
from tokenlearn.methods.generate import Generate
from tokenlearn.methods.sega import Sega
from tokenlearn.methods.sega_test import SegaTest
from tokenlearn.methods.textual_inversion import TextualInversion

__all__ = [
    "ClassTokens",
    "Doodl",
    "DoodlCase",
    "DoodlTest",
    "Edit",
    "Generate",
    "Sega",
    "SegaTest",
    "TextualInversion",
    "TokenTask",
]
