"""What a page asks for: the values of its controls, within bounds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from tokenlearn.errors import UserError, check_seeds, check_unicode, reason_of, shown
from tokenlearn.guidance.concepts import parse_concept

MOST_SEEDS = 8
MOST_STEPS = 100
MOST_PIXELS = 25_000_000
"""Of a photo; its edit holds several copies of it as floats."""
MOST_GUIDANCE = 30.0
MOST_CHARACTERS = 1000
"""Of a prompt or a concept."""
MOST_STRENGTH = 100.0


@dataclass(frozen=True)
class PageRequest:
    """The values of a page's controls.

    Attributes:
        prompt: prompt of generated images.
        seeds: their seeds, one image each.
        tokens: token to strength; a calibrated one, from -1 to 1, where the token's file has a calibration.
        concepts: concept to the scale of semantic guidance.
        photo: image to edit in place of generated ones.
        steps: sampling steps.
        guidance: scale of classifier-free guidance of generated images.
        negative_prompt: prompt of the unconditional prediction of generated images.
        change: share of the noise levels that an edit goes back to, above 0 to 1; more changes more.

    Raises:
        UserError: if a value is out of bounds.
    """

    prompt: str = "a portrait of a person"
    seeds: tuple[int, ...] = (1,)
    tokens: Mapping[str, float] = field(default_factory=dict)
    concepts: Mapping[str, float] = field(default_factory=dict)
    photo: Path | None = None
    steps: int = 20
    guidance: float = 4.0
    negative_prompt: str = ""
    change: float = 0.8

    def __post_init__(self) -> None:
        for what, text in (("prompt", self.prompt), ("negative prompt", self.negative_prompt)):
            _check_text(text, what)
        if not 0 < len(self.seeds) <= MOST_SEEDS:
            raise UserError(f"{len(self.seeds)} seeds; give 1 to {MOST_SEEDS}, such as 1, 2, 3")
        check_seeds("seeds", self.seeds)
        if not 1 <= self.steps <= MOST_STEPS:
            raise UserError(f"steps must be from 1 to {MOST_STEPS}, got {self.steps}")
        if not abs(self.guidance) <= MOST_GUIDANCE:
            raise UserError(f"guidance must be from -{MOST_GUIDANCE:g} to {MOST_GUIDANCE:g}, got {self.guidance}")
        if not 0 < self.change <= 1:
            raise UserError(f"the change of an edit must be above 0 and at most 1, got {self.change}")
        for concept in self.concepts:
            _check_text(concept, "concept")
            parse_concept(concept)
        for name, strength in (*self.tokens.items(), *self.concepts.items()):
            if not math.isfinite(strength) or abs(strength) > MOST_STRENGTH:
                raise UserError(f"the strength of '{name}' must be within {MOST_STRENGTH:g}, got {strength}")
        if self.photo is not None:
            check_photo(self.photo)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds as they are typed, with commas or spaces between them; the same one twice counts once.

    Raises:
        UserError: if one is no whole number, or there are too many.
    """
    words = [word for word in re.split(r"[\s,;]+", text.strip()[:MOST_CHARACTERS]) if word]
    wrong = next((word for word in words if not re.fullmatch(r"[0-9]{1,19}", word)), None)
    if wrong is not None:
        raise UserError(f"{shown(wrong)} is not a seed; write whole numbers such as 1, 2, 3")
    if len(words) > MOST_SEEDS:
        raise UserError(f"{len(words)} seeds; give 1 to {MOST_SEEDS}, such as 1, 2, 3")
    return tuple(dict.fromkeys(map(int, words)))


def check_photo(path: Path) -> None:
    """Refuse a file that is no image, or an image of too many pixels, before it is decoded.

    Raises:
        UserError: naming the file without its folder, which is the server's.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Exception as error:  # decoders raise errors of many kinds; the message may have the folder
        reason = reason_of(error).replace(str(path), path.name)
        raise UserError(f"cannot read the photo {shown(path.name)} ({reason}); drop a PNG or JPEG file") from None
    if width * height > MOST_PIXELS:
        raise UserError(
            f"the photo {shown(path.name)} has {width}x{height} pixels; resize it to at most "
            f"{MOST_PIXELS / 1e6:g} million"
        )


def _check_text(text: str, what: str) -> None:
    check_unicode(text, what)
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"the {what} has {len(text)} characters; write at most {MOST_CHARACTERS}")
