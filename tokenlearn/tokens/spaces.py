"""Spaces that the vectors of a token live in."""

from __future__ import annotations

from typing import Literal

Space = Literal["input", "output", "output_content"]
"""Where the vectors of a token live.

``input``
    In place of the placeholder's embedding, as in textual inversion: what other programs know.
``output``
    Added to the text encoders' outputs at all positions, each time that the placeholder stands in the prompt.
``output_content``
    The same from the first content token on: not at the begin of the text, which encoders of the CLIP kind put first.
"""
