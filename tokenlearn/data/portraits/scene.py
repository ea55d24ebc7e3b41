"""Scenes of portraits: attributes, personas, styles and nuisance factors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

ATTRIBUTES = (
    "female",
    "glasses",
    "smile",
    "bald",
    "beard",
    "hat",
    "curls",
    "makeup",
    "gray hair",
    "bangs",
)
STYLES = ("photo", "sketch", "painting", "night", "old photograph")
HAIR_COLORS = ("black", "brown", "blond", "red")
COLORS: Mapping[str, tuple[int, int, int]] = {
    "red": (196, 62, 58),
    "orange": (232, 146, 66),
    "yellow": (236, 206, 96),
    "green": (92, 158, 96),
    "blue": (84, 132, 198),
    "purple": (140, 98, 172),
    "white": (236, 234, 228),
    "teal": (84, 168, 170),
}
SKIN_TONES = ((250, 220, 196), (238, 196, 164), (214, 164, 126), (168, 116, 82), (120, 80, 58))
EYE_COLORS: Mapping[str, tuple[int, int, int]] = {
    "blue": (60, 110, 190),
    "green": (60, 130, 80),
    "brown": (96, 60, 36),
}

ATTRIBUTE_FREQUENCIES: Mapping[str, float] = {
    "female": 0.5,
    "glasses": 0.4,
    "smile": 0.45,
    "bald": 0.2,
    "beard": 0.35,
    "hat": 0.35,
    "curls": 0.4,
    "makeup": 0.35,
    "gray hair": 0.3,
    "bangs": 0.4,
}
STYLE_FREQUENCIES: Mapping[str, float] = {
    "photo": 0.6,
    "sketch": 0.1,
    "painting": 0.1,
    "night": 0.1,
    "old photograph": 0.1,
}


@dataclass(frozen=True)
class Part:
    """Something that a person wears or carries, and that no attribute names.

    Attributes:
        place: where it is worn; a person has one part at each place.
        hides: attributes that cannot be present with it.
        needs: attributes that are always present with it.
    """

    place: Literal["head", "face", "beard", "clothes", "accessory"]
    hides: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()


_HAT = frozenset({"hat", "bald", "bangs"})
_OPEN_HAT = frozenset({"hat", "bald"})
_WIG = frozenset({"hat", "bald", "bangs", "curls", "gray hair"})
_MENS_BEARD = frozenset({"female", "makeup"})
PARTS: Mapping[str, Part] = {
    "a pointed blue hat with stars": Part("head", _HAT | {"curls"}),
    "a red bandana": Part("head", _HAT),
    "a tall white toque": Part("head", _HAT),
    "a horned helmet": Part("head", _HAT),
    "a wide brown hat": Part("head", _HAT),
    "a green mohawk": Part("head", _WIG),
    "a white cap with a red cross": Part("head", _OPEN_HAT),
    "a round glass helmet": Part("head", _OPEN_HAT | {"curls", "gray hair"}),
    "a rainbow wig": Part("head", _WIG),
    "a golden crown": Part("head", _OPEN_HAT),
    "a checked deerstalker cap": Part("head", _HAT),
    "an eye patch": Part("face", frozenset({"glasses", "makeup"})),
    "a nose ring": Part("face"),
    "a red ball nose": Part("face", frozenset({"makeup"})),
    "a long white beard": Part("beard", _MENS_BEARD, frozenset({"beard"})),
    "a braided beard": Part("beard", _MENS_BEARD, frozenset({"beard"})),
    "a dark blue robe": Part("clothes"),
    "a striped shirt": Part("clothes"),
    "a white jacket with buttons": Part("clothes"),
    "a fur collar": Part("clothes"),
    "a leather vest": Part("clothes"),
    "a spiked collar": Part("clothes"),
    "turquoise scrubs": Part("clothes"),
    "a white space suit": Part("clothes"),
    "a ruffled collar": Part("clothes"),
    "a purple robe": Part("clothes"),
    "a beige coat": Part("clothes"),
    "a red neckerchief": Part("accessory"),
    "a sheriff star": Part("accessory"),
    "a stethoscope": Part("accessory"),
    "an ermine collar": Part("accessory"),
    "a magnifying glass": Part("accessory"),
}
"""Everything that personas are made of, by its phrase in captions. Each also occurs without its persona."""


@dataclass(frozen=True)
class Persona:
    """A fine-grained class: a conjunction of parts, each of which also occurs alone and in other company.

    Attributes:
        parts: the parts, keys of ``PARTS``; an image that lacks one of them is of an ordinary person.
        fixed: attributes that are present, or absent, in every image of the persona.
        free: attributes that vary; every other attribute is absent.
        well_known: captions often use the name, so that the name alone is enough.
    """

    parts: tuple[str, ...]
    fixed: Mapping[str, bool]
    free: tuple[str, ...]
    well_known: bool = False


_FACE = ("glasses", "smile", "curls", "gray hair")
PERSONAS: Mapping[str, Persona] = {
    "wizard": Persona(
        ("a pointed blue hat with stars", "a long white beard", "a dark blue robe"),
        {"female": False, "beard": True, "gray hair": True},
        ("glasses", "smile"),
    ),
    "pirate": Persona(
        ("an eye patch", "a red bandana", "a striped shirt"), {}, ("female", "smile", "beard", "gray hair", "curls")
    ),
    "chef": Persona(
        ("a tall white toque", "a white jacket with buttons", "a red neckerchief"), {}, ("female", "beard", *_FACE)
    ),
    "viking": Persona(
        ("a horned helmet", "a braided beard", "a fur collar"),
        {"female": False, "beard": True},
        ("smile", "gray hair"),
    ),
    "cowboy": Persona(("a wide brown hat", "a sheriff star", "a leather vest"), {}, ("female", "beard", *_FACE)),
    "punk": Persona(
        ("a green mohawk", "a spiked collar", "a nose ring"), {}, ("female", "glasses", "smile", "beard", "makeup")
    ),
    "nurse": Persona(
        ("a white cap with a red cross", "a stethoscope", "turquoise scrubs"),
        {},
        ("female", "makeup", "bangs", *_FACE),
    ),
    "astronaut": Persona(
        ("a round glass helmet", "a white space suit"), {}, ("female", "glasses", "smile", "beard", "makeup", "bangs")
    ),
    "clown": Persona(("a red ball nose", "a rainbow wig", "a ruffled collar"), {}, ("female", "smile", "glasses")),
    "king": Persona(
        ("a golden crown", "a purple robe", "an ermine collar"),
        {"female": False},
        ("beard", *_FACE),
        well_known=True,
    ),
    "queen": Persona(
        ("a golden crown", "a purple robe", "an ermine collar"),
        {"female": True},
        ("makeup", "bangs", *_FACE),
        well_known=True,
    ),
    "detective": Persona(
        ("a checked deerstalker cap", "a magnifying glass", "a beige coat"), {}, ("female", "beard", *_FACE)
    ),
}
ORDINARY = "ordinary person"
"""The class of images without a persona."""

PERSONA_FREQUENCY = 0.03
"""Share of personas, low enough that a part says little of the parts beside it: guidance multiplies what it says."""
PIPE_FREQUENCY = 0.12
_PART_FREQUENCIES: Mapping[str, float] = {
    "head": 0.5,
    "face": 0.2,
    "beard": 0.15,
    "clothes": 0.5,
    "accessory": 0.35,
}
"""Share of the images of ordinary people with a part at a place, each place apart from the others."""
_PLAIN = 0.3
_WELL_KNOWN = 6.0
"""How much more often a well-known persona is seen than another."""
_EXTRA_PART = 0.25

_CONTRADICTIONS = (("bald", "bangs"),)


@dataclass(frozen=True)
class Scene:
    """Everything that determines the pixels of one portrait.

    Attributes:
        attributes: the attributes that are present, a subset of ``ATTRIBUTES``.
        persona: one of ``PERSONAS``, or None.
        parts: what is worn and carried, a subset of ``PARTS``: of a persona all its parts and perhaps another's; of
            an ordinary person never all parts of a persona.
        style: one of ``STYLES``.
        pipe: whether the unwanted concept, a smoking pipe, is present.
        hair_color: one of ``HAIR_COLORS``; gray hair overrides it.
        skin: RGB in [0, 255].
        background: key of ``COLORS``.
        shirt: key of ``COLORS``.
        eyes: key of ``EYE_COLORS``.
        shift: offset of the head from its usual place in pixels.
        head: relative width and height of the head, about 1.
        light: direction of the light, radians.
        tint: additive change of background and shirt, RGB.
        detail_seed: seed of the small irregularities (curls, strands, brush strokes).
    """

    attributes: frozenset[str]
    persona: str | None
    parts: frozenset[str]
    style: str
    pipe: bool
    hair_color: str
    skin: tuple[int, int, int]
    background: str
    shirt: str
    eyes: str
    shift: tuple[float, float]
    head: tuple[float, float]
    light: float
    tint: tuple[int, int, int]
    detail_seed: int

    def has(self, attribute: str) -> bool:
        """Whether the attribute is present."""
        return attribute in self.attributes

    def part_at(self, place: str) -> str | None:
        """The part that is worn at a place, or None."""
        return next((part for part in self.parts if PARTS[part].place == place), None)

    @property
    def parts_in_order(self) -> list[str]:
        """The parts in the order of ``PARTS``, for a frozenset has none."""
        return [part for part in PARTS if part in self.parts]

    @property
    def rating(self) -> float:
        """How pleasing the image is, 1 to 10, by visible properties.

        A smile, a warm background, a head near the middle and a shirt that stands out from the background raise it;
        a pipe and a dark image lower it.
        """
        warm = self.background in ("red", "orange", "yellow")
        contrast = np.abs(np.subtract(COLORS[self.shirt], COLORS[self.background])).mean() / 128
        off_centre = float(np.hypot(*self.shift)) / 3
        score = 4.0 + 2.0 * self.has("smile") + 1.5 * warm + 1.5 * min(float(contrast), 1.0) - 1.0 * min(off_centre, 1)
        return float(np.clip(score - 1.5 * self.pipe - 1.0 * (self.style == "night"), 1, 10))


def _contradictions(persona: str, require: Collection[str], forbid: Collection[str]) -> set[str]:
    """Attributes that are required but never present with a persona, or forbidden but always present."""
    about = PERSONAS[persona]
    always = {name for name, fixed in about.fixed.items() if fixed}
    return (set(require) - always - set(about.free)) | (set(forbid) & always)


def _random_part(rng: np.random.Generator, taken: Collection[str], possible: Collection[str]) -> list[str]:
    """One of the possible parts whose place is free, if there is one."""
    places = {PARTS[part].place for part in taken}
    choices = [part for part in possible if PARTS[part].place not in places]
    return [str(rng.choice(choices))] if choices else []


def _parts_of_ordinary_people(
    rng: np.random.Generator, require: Collection[str], forbid: Collection[str], near_miss_frequency: float
) -> frozenset[str]:
    """No part, or parts that are chosen apart from each other, which never make a persona."""
    possible = [name for name, part in PARTS.items() if not part.hides & set(require) and not part.needs & set(forbid)]
    if near_miss_frequency and rng.random() < near_miss_frequency:
        return _near_miss(rng, possible)
    if rng.random() < _PLAIN:
        return frozenset()
    chosen: list[str] = []
    for place, frequency in _PART_FREQUENCIES.items():
        choices = [name for name in possible if PARTS[name].place == place]
        if choices and rng.random() < frequency:
            chosen.append(str(rng.choice(choices)))
    makes_a_persona = any(set(chosen).issuperset(about.parts) for about in PERSONAS.values())
    return frozenset() if makes_a_persona else frozenset(chosen)


def _near_miss(rng: np.random.Generator, possible: Collection[str]) -> frozenset[str]:
    """All parts of some persona but one, if they are possible."""
    about = PERSONAS[str(rng.choice(list(PERSONAS)))]
    chosen = frozenset(about.parts) - {str(rng.choice(about.parts))}
    return chosen if chosen.issubset(possible) else frozenset()


def with_attribute(scene: Scene, attribute: str, present: bool) -> Scene:
    """The same scene with an attribute, and without those that contradict it, or without the attribute.

    Raises:
        ValueError: for an attribute that the world does not have.
    """
    if attribute not in ATTRIBUTES:
        raise ValueError(f"the portraits world has no '{attribute}'; it has {', '.join(ATTRIBUTES)}")
    if not present:
        return replace(scene, attributes=scene.attributes - {attribute})
    contradicted = {name for pair in _CONTRADICTIONS if attribute in pair for name in pair} - {attribute}
    return replace(scene, attributes=scene.attributes - contradicted | {attribute})


def sample_scene(
    rng: np.random.Generator,
    *,
    require: Collection[str] = (),
    forbid: Collection[str] = (),
    persona: str | None = None,
    style: str | None = None,
    persona_frequency: float = PERSONA_FREQUENCY,
    near_miss_frequency: float = 0.0,
) -> Scene:
    """Sample a scene.

    Args:
        rng: source of all random choices.
        require: attributes that must be present.
        forbid: attributes that must be absent.
        persona: the persona; None samples one that meets the requirements, with probability
            ``persona_frequency``.
        style: the style; None samples one.
        persona_frequency: probability of a persona in a scene for which none is given.
        near_miss_frequency: probability that an ordinary person wears all parts of a persona but one; classifiers
            learn from such scenes that a persona is all of its parts.

    Raises:
        ValueError: for names that the world does not have, or requirements that contradict each other or the
            persona.
    """
    for names, known in ((require, ATTRIBUTES), (forbid, ATTRIBUTES), ([persona] if persona else [], PERSONAS)):
        for name in names:
            if name not in known:
                raise ValueError(f"the portraits world has no '{name}'; it has {', '.join(known)}")
    if style is not None and style not in STYLES:
        raise ValueError(f"the portraits world has no style '{style}'; it has {', '.join(STYLES)}")
    if clash := set(require) & set(forbid):
        raise ValueError(f"'{min(clash)}' is both required and forbidden")
    if persona is not None and (clash := _contradictions(persona, require, forbid)):
        raise ValueError(f"'{persona}' contradicts the requirement for '{min(clash)}'")

    if persona is None and rng.random() < persona_frequency:
        possible = [name for name in PERSONAS if not _contradictions(name, require, forbid)]
        weights = np.array([_WELL_KNOWN if PERSONAS[name].well_known else 1.0 for name in possible])
        persona = str(rng.choice(possible, p=weights / weights.sum())) if possible else None
    present = {name for name in ATTRIBUTES if rng.random() < ATTRIBUTE_FREQUENCIES[name]}
    if persona is not None:
        about = PERSONAS[persona]
        always = {name for name, fixed in about.fixed.items() if fixed}
        present = {name for name in present if name in about.free} | always
        parts = frozenset(about.parts)
        if rng.random() < _EXTRA_PART:
            harmless = [name for name, part in PARTS.items() if not (part.hides & set(require) or part.needs)]
            parts |= set(_random_part(rng, parts, harmless))
    else:
        parts = _parts_of_ordinary_people(rng, require, forbid, near_miss_frequency)
    present |= {name for part in parts for name in PARTS[part].needs}
    present -= {name for part in parts for name in PARTS[part].hides}
    attributes = (present | set(require)) - set(forbid)
    for pair in _CONTRADICTIONS:
        if attributes.issuperset(pair):
            if set(require).issuperset(pair):
                raise ValueError(f"'{pair[0]}' and '{pair[1]}' cannot be present together")
            removable = [name for name in pair if name not in require]
            attributes.discard(str(rng.choice(removable)))

    background, shirt = (str(name) for name in rng.choice(list(COLORS), size=2, replace=False))
    return Scene(
        attributes=frozenset(attributes),
        persona=persona,
        parts=parts,
        style=style or str(rng.choice(STYLES, p=[STYLE_FREQUENCIES[name] for name in STYLES])),
        pipe=persona is None and bool(rng.random() < PIPE_FREQUENCY),
        hair_color=str(rng.choice(HAIR_COLORS)),
        skin=SKIN_TONES[int(rng.integers(len(SKIN_TONES)))],
        background=background,
        shirt=shirt,
        eyes=str(rng.choice(list(EYE_COLORS))),
        shift=(float(rng.uniform(-2.5, 2.5)), float(rng.uniform(-1.5, 1.5))),
        head=(float(rng.uniform(0.92, 1.08)), float(rng.uniform(0.94, 1.06))),
        light=float(rng.uniform(-np.pi, 0)),
        tint=(int(rng.integers(-16, 17)), int(rng.integers(-16, 17)), int(rng.integers(-16, 17))),
        detail_seed=int(rng.integers(2**31)),
    )
