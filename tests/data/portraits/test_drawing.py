from dataclasses import replace
from functools import cache
from itertools import combinations, permutations

import numpy as np
import pytest

from tokenlearn.data.portraits import (
    ATTRIBUTES,
    HAIR_COLORS,
    IMAGE_SIZE,
    PARTS,
    PERSONAS,
    STYLES,
    attribute_mask,
    draw,
    sample_scene,
    with_attribute,
)
from tokenlearn.data.portraits.scene import SKIN_TONES

PLAIN = replace(
    sample_scene(np.random.default_rng(0), persona_frequency=0),
    attributes=frozenset(),
    parts=frozenset(),
    pipe=False,
    hair_color="black",
    skin=SKIN_TONES[0],
    eyes="blue",
    background="blue",
    shirt="red",
    shift=(0.0, 0.0),
    head=(1.0, 1.0),
    light=-1.5,
    tint=(0, 0, 0),
)


@cache
def pixels(scene):
    return np.asarray(draw(scene)).astype(int)


def changed(scene, other, contrast=24):
    """Number of pixels whose colour differs by at least ``contrast`` of 255 in some channel."""
    return int((np.abs(pixels(scene) - pixels(other)).max(axis=2) >= contrast).sum())


def with_attributes(scene, *names):
    return replace(scene, attributes=frozenset(names))


def as_persona(scene, persona):
    """The scene with a persona's parts and nothing that is free."""
    about = PERSONAS[persona]
    fixed = [name for name, present in about.fixed.items() if present]
    return replace(with_attributes(scene, *fixed), persona=persona, parts=frozenset(about.parts))


def test_same_seed_same_pixels():
    for seed in range(5):
        first, second = (draw(sample_scene(np.random.default_rng(seed))) for _ in range(2))
        assert first.size == (IMAGE_SIZE, IMAGE_SIZE)
        assert first.mode == "RGB"
        assert first.tobytes() == second.tobytes()
    assert changed(sample_scene(np.random.default_rng(0)), sample_scene(np.random.default_rng(1))) > 500


@pytest.mark.parametrize("style", STYLES)
def test_every_attribute_shows_beside_every_other(style):
    scene = replace(PLAIN, style=style)
    for name, other in permutations(ATTRIBUTES, 2):
        if {name, other} != {"bald", "bangs"}:
            assert changed(with_attributes(scene, other), with_attributes(scene, other, name)) >= 30, (name, other)


@pytest.mark.parametrize("style", STYLES)
def test_every_attribute_shows_with_every_hair_and_skin(style):
    for hair_color in HAIR_COLORS:
        for skin in SKIN_TONES:
            scene = replace(PLAIN, style=style, hair_color=hair_color, skin=skin)
            for name in ATTRIBUTES:
                difference = changed(scene, with_attributes(scene, name), contrast=12)
                assert difference >= 30, (name, hair_color, skin)


@pytest.mark.parametrize("persona", PERSONAS)
def test_the_free_attributes_of_personas_show(persona):
    about = PERSONAS[persona]
    for style in STYLES:
        scene = as_persona(replace(PLAIN, style=style), persona)
        for name in about.free:
            assert changed(scene, with_attributes(scene, *scene.attributes, name)) >= 30, (name, style)


@pytest.mark.parametrize("style", STYLES)
def test_every_part_shows_alone_and_a_persona_without_it_differs(style):
    plain = replace(PLAIN, style=style)
    for name, part in PARTS.items():
        needed = with_attributes(plain, *part.needs)
        assert changed(needed, replace(needed, parts=frozenset({name})), contrast=16) >= 12, name
    for persona, about in PERSONAS.items():
        scene = as_persona(plain, persona)
        for part in about.parts:
            assert changed(scene, replace(scene, parts=scene.parts - {part}), contrast=16) >= 12, (persona, part)


@pytest.mark.parametrize("style", STYLES)
def test_personas_differ_from_ordinary_people_and_each_other(style):
    plain = replace(PLAIN, style=style)
    scenes = {None: plain, **{persona: as_persona(plain, persona) for persona in PERSONAS}}
    for one, other in combinations(scenes, 2):
        least = 50 if {one, other} == {"king", "queen"} else 150
        assert changed(scenes[one], scenes[other]) >= least, (one, other)


def test_styles_and_the_pipe_show():
    for one, other in combinations(STYLES, 2):
        assert changed(replace(PLAIN, style=one), replace(PLAIN, style=other)) >= 1000
    for style in STYLES:
        scene = replace(PLAIN, style=style)
        assert changed(scene, replace(scene, pipe=True)) >= 30


@pytest.mark.parametrize(
    ("change", "least"),
    [
        ({"hair_color": "blond"}, 200),
        ({"skin": SKIN_TONES[-1]}, 300),
        ({"background": "green"}, 800),
        ({"shirt": "teal"}, 200),
        ({"eyes": "brown"}, 8),
        ({"shift": (2.0, -1.0)}, 200),
        ({"head": (1.08, 0.94)}, 60),
    ],
)
def test_nuisance_factors_show(change, least):
    assert changed(PLAIN, replace(PLAIN, **change)) >= least


def test_gray_hair_overrides_the_hair_colour():
    gray = with_attributes(PLAIN, "gray hair")
    assert np.array_equal(pixels(gray), pixels(replace(gray, hair_color="red")))
    curls = with_attributes(PLAIN, "curls")
    assert changed(curls, replace(curls, detail_seed=curls.detail_seed + 1), contrast=8) > 0


def test_the_mask_of_an_attribute_is_where_it_shows():
    glasses = attribute_mask(PLAIN, "glasses")
    assert glasses.shape == (IMAGE_SIZE, IMAGE_SIZE)
    assert 30 < glasses.sum() < 500
    assert not glasses[:20].any()
    assert not glasses[50:].any()
    worn = with_attribute(PLAIN, "glasses", True)
    assert np.array_equal(attribute_mask(worn, "glasses"), glasses)
    assert np.array_equal(pixels(worn)[~glasses], pixels(PLAIN)[~glasses])


def test_an_attribute_replaces_what_contradicts_it():
    fringe = with_attribute(with_attribute(PLAIN, "bangs", True), "smile", True)
    bald = with_attribute(fringe, "bald", True)
    assert (bald.has("bald"), bald.has("bangs"), bald.has("smile")) == (True, False, True)
    assert not with_attribute(bald, "bald", False).has("bangs")
    # The fringe is a part of what baldness decides.
    assert (attribute_mask(fringe, "bald") & attribute_mask(with_attribute(fringe, "bald", False), "bangs")).any()
    with pytest.raises(ValueError, match=r"'monocle'.*glasses"):
        with_attribute(PLAIN, "monocle", True)
