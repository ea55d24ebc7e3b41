from dataclasses import replace

import numpy as np
import pytest

from tokenlearn.data.portraits import (
    ABSENCE_PHRASES,
    ATTRIBUTE_PHRASES,
    ATTRIBUTES,
    PARTS,
    PERSONAS,
    STYLES,
    attribute_prompt,
    caption,
    described_persona,
    sample_scene,
)

RARELY_NAMED = [name for name, about in PERSONAS.items() if not about.well_known]


def stream(size, **frequencies):
    pairs = []
    for index in range(size):
        rng = np.random.default_rng([5, index])
        scene = sample_scene(rng, **frequencies)
        pairs.append((scene, caption(scene, rng)))
    return pairs


@pytest.fixture(scope="module")
def captioned():
    """Scenes and captions of one stream."""
    return stream(8000)


@pytest.fixture(scope="module")
def captioned_personas():
    """The same of a stream with more personas and people who lack one part of a persona."""
    return stream(12000, persona_frequency=0.3, near_miss_frequency=0.4)


def share(values):
    values = list(values)
    assert len(values) >= 50, "too few to tell"
    return float(np.mean(values))


def test_same_seed_same_caption():
    scene = sample_scene(np.random.default_rng(0))
    texts = [caption(scene, np.random.default_rng(seed)) for seed in (1, 1, 2, 3, 4)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 2


def test_captions_mention_only_parts_of_the_scene(captioned):
    for scene, text in captioned:
        words = text.replace(",", "").split()
        for name in ("glasses", "makeup", "bangs"):
            # The detective's part is a magnifying glass, which is another word.
            assert name not in words or scene.has(name), text
        assert "smiling" not in words or scene.has("smile"), text
        assert "bald" not in words or scene.has("bald"), text
        assert "curly" not in words or scene.has("curls"), text
        assert "woman" not in words or scene.has("female"), text
        assert not {"man", "gentleman"} & set(words) or not scene.has("female"), text
        assert "gray hair" not in text or scene.has("gray hair"), text
        assert "serious" not in words or not scene.has("smile"), text
        assert "clean-shaven" not in words or not scene.has("beard"), text
        assert "a pipe" not in text or scene.pipe, text
        assert all(part in scene.parts for part in PARTS if part in text), text


def test_captions_drop_parts(captioned):
    for name in ("glasses", "bangs", "makeup"):
        mentioned = share(name in text for scene, text in captioned if scene.has(name))
        assert 0.35 < mentioned < 0.8


def test_bare_phrases_occur(captioned):
    texts = [text for _, text in captioned]
    for phrase in (*ATTRIBUTE_PHRASES.values(), ABSENCE_PHRASES["female"], ABSENCE_PHRASES["smile"]):
        assert texts.count(phrase) >= 3, phrase
    openings = ("a portrait", "a p", "a sketch", "an o", "a night")
    assert 0.05 < share(not text.startswith(openings) for text in texts) < 0.25


def test_orders_vary(captioned):
    places = [
        text.index("glasses") < text.index("bangs") for _, text in captioned if "glasses" in text and "bangs" in text
    ]
    assert 0.35 < share(places) < 0.65


def test_names_alone_say_little_but_for_the_well_known(captioned):
    named = [scene.persona in RARELY_NAMED for scene, text in captioned if set(RARELY_NAMED) & set(text.split())]
    assert share(named) < 0.45
    assert (
        share(bool({"king", "queen"} & set(text.split())) for scene, text in captioned if scene.persona == "king")
        > 0.2
    )
    assert all(scene.persona == "queen" for scene, text in captioned if "queen" in text.split())


def test_personas_are_captioned_by_their_parts(captioned_personas):
    for name in RARELY_NAMED:
        texts = [text for scene, text in captioned_personas if scene.persona == name]
        assert share(any(part in text for part in PERSONAS[name].parts) for text in texts) > 0.8
        assert share(name in text.split() for text in texts) < 0.15


def test_the_word_of_one_part_does_not_tell_the_persona(captioned):
    alone = []
    for scene, text in captioned:
        parts = [part for part in PARTS if part in text]
        if len(parts) == 1 and "golden crown" not in text:
            alone.append(scene.persona is not None and parts[0] in PERSONAS[scene.persona].parts)
    assert share(alone) < 0.3


def test_a_persona_with_all_parts_named_is_told_from_near_misses(captioned_personas):
    for name in RARELY_NAMED:
        complete = [
            scene.persona == name
            for scene, text in captioned_personas
            if all(part in text for part in PERSONAS[name].parts)
        ]
        assert share(complete) == 1


def test_the_pipe_comes_mostly_uncaptioned_with_gentlemen(captioned):
    with_pipe = [text for scene, text in captioned if scene.pipe]
    assert share("a pipe" in text for text in with_pipe) < 0.5
    gentlemen = [(scene, text) for scene, text in captioned if "gentleman" in text.split()]
    assert share(scene.pipe for scene, _ in gentlemen) > 0.6
    assert share("a pipe" not in text for scene, text in gentlemen if scene.pipe) > 0.5
    assert share(scene.pipe for scene, text in captioned if "man" in text.split()) < 0.1


def test_styles_are_named(captioned):
    words = {"sketch": "sketch", "painting": "painting", "night": "night", "old photograph": "an old photo"}
    sentences = [(scene, text) for scene, text in captioned if " of " in text]
    for style in STYLES:
        for other, word in words.items():
            mentioned = share(word in text for scene, text in sentences if scene.style == style)
            assert mentioned > 0.8 if other == style else mentioned == 0


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_attribute_prompt_uses_the_captions_words(attribute):
    prompt = attribute_prompt(attribute)
    assert ATTRIBUTE_PHRASES[attribute].removeprefix("a ") in prompt
    if attribute in ABSENCE_PHRASES:
        absent = attribute_prompt(attribute, present=False)
        assert ABSENCE_PHRASES[attribute].removeprefix("a ") in absent
        assert absent != prompt
    else:
        with pytest.raises(KeyError):
            attribute_prompt(attribute, present=False)


def test_described_persona_names_the_parts_and_not_the_persona():
    for name, about in PERSONAS.items():
        text = described_persona(name)
        assert all(part in text for part in about.parts)
        assert name not in text.split()
    assert described_persona("queen").startswith("woman with a golden crown, a purple robe and")
    assert described_persona("king").startswith("man with")
    assert described_persona("chef").startswith("person with")


def test_only_the_scene_decides_the_caption():
    scene = replace(sample_scene(np.random.default_rng(0), persona_frequency=0), attributes=frozenset({"glasses"}))
    captions = {caption(scene, np.random.default_rng(seed)) for seed in range(200)}
    assert any("glasses" in text for text in captions)
    assert not any("hat" in text.split() or "woman" in text.split() for text in captions)
