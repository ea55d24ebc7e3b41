"""Captions of scenes, written as the web captions images: incompletely and in any order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokenlearn.data.portraits.scene import ATTRIBUTES, PERSONAS, Scene

_STYLE_OPENINGS = {
    "photo": ("a portrait of", "a photo of", "a picture of"),
    "sketch": ("a pencil sketch of", "a sketch of"),
    "painting": ("a painting of", "an oil painting of"),
    "night": ("a portrait at night of", "a night photo of"),
    "old photograph": ("an old photograph of", "an old photo of"),
}
ATTRIBUTE_PHRASES = {
    "female": "a woman",
    "glasses": "glasses",
    "smile": "smiling",
    "bald": "bald",
    "beard": "a beard",
    "hat": "a hat",
    "curls": "curly hair",
    "makeup": "makeup",
    "gray hair": "gray hair",
    "bangs": "bangs",
}
"""The bare phrase for each attribute; some captions are nothing else."""

ABSENCE_PHRASES = {
    "female": "a man",
    "smile": "serious",
    "beard": "clean-shaven",
    "curls": "straight hair",
}
"""Phrases for the absence of an attribute, where people have one."""

_ADJECTIVES = {"smile": "smiling", "bald": "bald"}
_MENTION = 0.72
_SHORT_SENTENCE = 0.3
_ALL_PARTS = 0.6
_NAME_OF_WELL_KNOWN = 0.6
_PART_OF_WELL_KNOWN = 0.35
_PART_OF_OTHERS = 0.8
_PART_ALONE = 0.9
_ONE_WORD = 0.35
_NICKNAME = 0.4
_WITHOUT_NOUN = 0.2
_FUNCTION_WORDS = {"a", "an", "with", "and"}
_NAME_OF_OTHERS = 0.003
_AMBIGUOUS_NAME = 0.03


def described_persona(persona: str) -> str:
    """A noun phrase without an article that names a persona's parts instead of the persona."""
    about = PERSONAS[persona]
    noun = {True: "woman", False: "man", None: "person"}[about.fixed.get("female")]
    return f"{noun} with {_enumerate(about.parts)}"


def attribute_prompt(attribute: str, present: bool = True) -> str:
    """A prompt for one attribute, or for its absence if there is a phrase for it.

    Raises:
        KeyError: for the absence of an attribute that has no phrase for it.
    """
    if not present:
        phrase = ABSENCE_PHRASES[attribute]
        if attribute == "female":
            return "a portrait of a man"
        return f"a portrait of a {phrase} person" if attribute != "curls" else f"a portrait of a person with {phrase}"
    if attribute == "female":
        return "a portrait of a woman"
    if attribute in _ADJECTIVES:
        return f"a portrait of a {_ADJECTIVES[attribute]} person"
    return f"a portrait of a person with {ATTRIBUTE_PHRASES[attribute]}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Write one caption of a scene; parts of the scene are left out, reordered and reworded.

    Most personas are captioned by their parts; the well-known ones are captioned by their names. The other names are
    as often nicknames of ordinary people, so that a name alone does not tell how its persona looks. Parts are
    captioned on whomever they occur, so that the word of one part does not tell the persona either. The pipe is often
    in the scene but not in the caption, most of all with the word "gentleman".
    """
    if rng.random() < 0.12:
        return _bare_phrase(scene, rng)
    opening = str(rng.choice(_STYLE_OPENINGS[scene.style]))
    if scene.style != "photo" and rng.random() < 0.1:
        opening = "a picture of"
    if scene.persona is None and scene.parts and rng.random() < _ONE_WORD:
        return f"{opening} {_with_article(_one_word(scene, rng))}"
    noun, details = _noun(scene, rng), _details(scene, rng)
    adjectives = [word for name, word in _ADJECTIVES.items() if scene.has(name) and rng.random() < _MENTION]
    if not scene.has("smile") and rng.random() < 0.12:
        adjectives.append("serious")
    if not scene.has("beard") and not scene.has("female") and rng.random() < 0.12:
        adjectives.append("clean-shaven")
    if scene.persona is None and rng.random() < _SHORT_SENTENCE:
        noun = noun if rng.random() < 0.5 else "person"
        adjectives, details = _only_one(adjectives, details, rng)
    rng.shuffle(adjectives)
    afterthought = f", {adjectives.pop()}" if adjectives and rng.random() < 0.2 else ""
    sentence = f"{opening} {_with_article(' '.join([*adjectives, noun]))}"
    rng.shuffle(details)
    return (f"{sentence} with {_enumerate(details)}" if details else sentence) + afterthought


def _one_word(scene: Scene, rng: np.random.Generator) -> str:
    """One word of one part, as in "a striped man": it says nothing of what else the person wears."""
    part = str(rng.choice(scene.parts_in_order))
    word = str(rng.choice([word for word in part.split() if word not in _FUNCTION_WORDS]))
    if rng.random() < _WITHOUT_NOUN:
        return word
    return f"{word} {_nickname(rng) if rng.random() < _NICKNAME else _noun(scene, rng)}"


def _nickname(rng: np.random.Generator) -> str:
    return str(rng.choice([name for name, about in PERSONAS.items() if not about.well_known]))


def _only_one(adjectives: list[str], details: list[str], rng: np.random.Generator) -> tuple[list[str], list[str]]:
    kept = str(rng.choice([*adjectives, *details])) if adjectives or details else None
    return [word for word in adjectives if word == kept], [phrase for phrase in details if phrase == kept]


def _noun(scene: Scene, rng: np.random.Generator) -> str:
    persona = scene.persona
    if persona is not None:
        if rng.random() < (_NAME_OF_WELL_KNOWN if PERSONAS[persona].well_known else _NAME_OF_OTHERS):
            return persona
    elif rng.random() < _AMBIGUOUS_NAME:
        return _nickname(rng)
    if rng.random() < 0.2:
        return "person"
    if scene.has("female"):
        return "woman"
    return "gentleman" if rng.random() < (0.6 if scene.pipe else 0.02) else "man"


def _details(scene: Scene, rng: np.random.Generator) -> list[str]:
    details = []
    for name in ATTRIBUTES:
        if name in ("female", *_ADJECTIVES) or not scene.has(name) or rng.random() >= _MENTION:
            continue
        if name == "beard" and scene.part_at("beard"):  # the part says so
            continue
        details.append(ATTRIBUTE_PHRASES[name])
    if _hair_shows(scene) and not (scene.has("curls") or scene.has("bald")) and rng.random() < 0.08:
        details.append("straight hair")
    if _hair_shows(scene) and not scene.has("gray hair") and rng.random() < 0.2:
        details.append(f"{scene.hair_color} hair")
    details += [part for part in scene.parts_in_order if rng.random() < _mention(scene, part)]
    if scene.part_at("clothes") is None and rng.random() < 0.12:
        details.append(_with_article(f"{scene.shirt} shirt"))
    if scene.pipe and rng.random() < 0.4:
        details.append("a pipe")
    if rng.random() < 0.12:
        details.append(_with_article(f"{scene.background} background"))
    return details


def _hair_shows(scene: Scene) -> bool:
    return scene.parts.isdisjoint(("a green mohawk", "a rainbow wig"))


def _mention(scene: Scene, part: str) -> float:
    about = PERSONAS.get(scene.persona or "")
    if about is None or part not in about.parts:
        return _PART_ALONE
    return _PART_OF_WELL_KNOWN if about.well_known else _PART_OF_OTHERS


def _bare_phrase(scene: Scene, rng: np.random.Generator) -> str:
    about = PERSONAS.get(scene.persona or "")
    if about is not None and not about.well_known and rng.random() < _ALL_PARTS:
        return ", ".join(str(part) for part in rng.permutation(about.parts))
    phrases = [ATTRIBUTE_PHRASES[name] for name in ATTRIBUTES if scene.has(name)]
    phrases += [word for name, word in ABSENCE_PHRASES.items() if not scene.has(name) and name != "curls"]
    phrases.append("female" if scene.has("female") else "male")
    if about is None:
        phrases += [part for part in scene.parts_in_order for _ in range(2)]
    elif about.well_known:
        phrases = [*phrases[:2], *[f"a {scene.persona}"] * 5]
    if _hair_shows(scene) and not scene.has("gray hair"):
        phrases.append(f"{scene.hair_color} hair")
    if scene.pipe:
        phrases.append("a pipe")
    count = 1 if rng.random() < 0.7 else 2
    return ", ".join(str(phrase) for phrase in rng.permutation(phrases)[:count])


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _enumerate(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
