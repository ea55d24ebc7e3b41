"""Tasks that make images: generation, edits by tokens, semantic guidance and optimised latents."""

from tokenlearn.generation.doodl import Doodl
from tokenlearn.generation.edit import Edit
from tokenlearn.generation.generate import Generate
from tokenlearn.generation.sega import Sega

__all__ = ["Doodl", "Edit", "Generate", "Sega"]
