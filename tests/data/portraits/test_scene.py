from dataclasses import replace

import numpy as np
import pytest

from tokenlearn.data.portraits import ATTRIBUTES, PARTS, PERSONAS, STYLES, sample_scene


def rng(seed=0):
    return np.random.default_rng(seed)


def scenes(count, **options):
    return [sample_scene(rng(seed), **options) for seed in range(count)]


def test_same_seed_same_scene():
    assert sample_scene(rng(3)) == sample_scene(rng(3))
    assert sample_scene(rng(3)) != sample_scene(rng(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"require": ["monocle"]}, "'monocle'.*glasses"),
        ({"forbid": ["monocle"]}, "'monocle'"),
        ({"persona": "dentist"}, "'dentist'.*wizard"),
        ({"style": "fresco"}, "'fresco'.*sketch"),
        ({"require": ["hat", "smile"], "forbid": ["hat"]}, "'hat'"),
        ({"require": ["bald", "bangs"]}, "'bald' and 'bangs'"),
        ({"persona": "king", "require": ["female"]}, "'king'.*'female'"),
        ({"persona": "wizard", "require": ["hat"]}, "'wizard'.*'hat'"),
        ({"persona": "queen", "forbid": ["female"]}, "'queen'.*'female'"),
    ],
)
def test_unknown_and_contradictory_requests_raise(options, message):
    with pytest.raises(ValueError, match=message):
        sample_scene(rng(), **options)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_require_and_forbid_hold(attribute):
    assert all(scene.has(attribute) for scene in scenes(60, require=[attribute]))
    assert not any(scene.has(attribute) for scene in scenes(60, forbid=[attribute]))


def test_bald_heads_have_no_bangs():
    sampled = scenes(400)
    assert not any(scene.has("bald") and scene.has("bangs") for scene in sampled)
    assert any(scene.has("bald") for scene in sampled)
    assert all(scene.has("bangs") for scene in scenes(60, require=["bangs"], persona_frequency=0))


def test_attributes_and_styles_occur_apart_and_together():
    sampled = scenes(800)
    for name in ATTRIBUTES:
        assert 0.05 < np.mean([scene.has(name) for scene in sampled]) < 0.6
    for style in STYLES:
        assert sum(scene.style == style for scene in sampled) > 40
    assert {scene.persona for scene in scenes(6000)} == {None, *PERSONAS}


@pytest.mark.parametrize("persona", PERSONAS)
def test_personas_keep_what_is_fixed_and_vary_what_is_free(persona):
    about = PERSONAS[persona]
    sampled = scenes(120, persona=persona)
    for name in ATTRIBUTES:
        present = {scene.has(name) for scene in sampled}
        if name in about.fixed:
            assert present == {about.fixed[name]}
        else:
            assert present == ({True, False} if name in about.free else {False}), name
    assert {scene.persona for scene in sampled} == {persona}
    assert not any(scene.pipe for scene in sampled)


def test_personas_have_all_their_parts_and_ordinary_people_never():
    for scene in scenes(1500):
        complete = {name for name, about in PERSONAS.items() if scene.parts.issuperset(about.parts)}
        if scene.persona is None:
            assert not complete
        else:  # king and queen have the same parts
            assert scene.persona in complete
            assert complete <= {scene.persona, "king", "queen"}


def test_near_misses_lack_one_part_of_a_persona():
    sampled = scenes(400, persona_frequency=0, near_miss_frequency=1)
    lacking = [
        [set(about.parts) - scene.parts for about in PERSONAS.values() if not scene.parts - set(about.parts)]
        for scene in sampled
        if scene.parts
    ]
    assert len(lacking) > 300
    assert all(any(len(rest) == 1 for rest in missing) for missing in lacking)
    assert {scene.persona for scene in sampled} == {None}
    bald = scenes(100, persona_frequency=0, near_miss_frequency=1, require=["bald"], forbid=["beard"])
    assert all(scene.has("bald") and not scene.has("beard") for scene in bald)


def test_every_part_occurs_alone_in_other_company_and_on_other_personas():
    sampled = scenes(6000)
    owners = {part: {name for name, about in PERSONAS.items() if part in about.parts} for part in PARTS}
    for part, its_personas in owners.items():
        assert its_personas
        ordinary = [scene.parts for scene in sampled if part in scene.parts and scene.persona is None]
        assert sum(len(parts) == 1 for parts in ordinary) >= 10, part
        assert sum(len(parts) > 1 for parts in ordinary) >= 20, part
        shown = [scene for scene in sampled if part in scene.parts and scene.persona in its_personas]
        assert len(ordinary) > 0.35 * len(shown), part
    strangers = {
        part
        for scene in scenes(2000, persona_frequency=1)
        for part in scene.parts - set(PERSONAS[scene.persona].parts)
    }
    assert {PARTS[part].place for part in strangers} == {"face", "accessory"}
    assert len(strangers) >= 8


def test_one_part_at_a_place_and_nothing_that_it_hides():
    for scene in scenes(3000):
        assert len({PARTS[part].place for part in scene.parts}) == len(scene.parts)
        for part in scene.parts:
            if scene.persona is None or part not in PERSONAS[scene.persona].parts:
                assert not PARTS[part].hides & scene.attributes, (part, scene)
            assert PARTS[part].needs <= scene.attributes


def test_requirements_choose_among_the_personas_that_meet_them():
    serious_women = scenes(150, require=["female"], forbid=["smile"], persona_frequency=1)
    personas = {scene.persona for scene in serious_women}
    assert personas == set(PERSONAS) - {"king", "wizard", "viking"}
    assert {scene.persona for scene in scenes(20, require=["hat"], persona_frequency=1)} == {None}


def test_rating_is_in_range_and_rises_with_a_smile():
    for scene in scenes(300):
        serious = replace(scene, attributes=scene.attributes - {"smile"})
        smiling = replace(scene, attributes=scene.attributes | {"smile"})
        assert 1 <= serious.rating < smiling.rating <= 10


def test_rating_falls_with_a_pipe_at_night_and_off_centre():
    for scene in scenes(50, require=["smile"], style="photo", persona_frequency=0):
        plain = replace(scene, pipe=False, shift=(0.0, 0.0))
        for worse in (replace(plain, pipe=True), replace(plain, style="night"), replace(plain, shift=(2.0, 1.0))):
            assert worse.rating < plain.rating
