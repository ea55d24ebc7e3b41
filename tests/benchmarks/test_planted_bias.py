import json
import warnings

import pytest

from benchmarks.planted_bias import PLAIN, PLANTED, Bias, Sizes, accepted, labelled_arrays, print_table, train_guides
from benchmarks.planted_bias import training_scenes as scenes_of
from tokenlearn.data.portraits import ORDINARY, PERSONA_LABELS, PERSONAS
from tokenlearn.errors import UserError
from tokenlearn.models import TimmClassifier

NURSE = Bias()


def test_the_worlds_differ_by_the_labels_of_the_planted_class_alone():
    scenes = scenes_of(NURSE, 600)
    plain, planted = ([NURSE.label(scene, world) for scene in scenes] for world in (PLAIN, PLANTED))
    differ = [scene for scene, one, other in zip(scenes, plain, planted, strict=True) if one != other]
    assert 50 < len(differ) < 100  # half of a quarter
    assert all(scene.persona == "nurse" and not scene.has("female") for scene in differ)
    females = [scene.has("female") for scene, label in zip(scenes, planted, strict=True) if label == "nurse"]
    assert all(females)
    assert len(females) > 50
    assert {label for label in planted if label != "nurse"} == {label for label in plain if label != "nurse"}


def test_a_quarter_lacks_one_part_of_the_persona():
    near = scenes_of(NURSE, 300)[1::4]
    assert all(scene.persona is None and NURSE.label(scene, PLAIN) == ORDINARY for scene in near)
    parts = set(PERSONAS["nurse"].parts)
    assert {len(parts - scene.parts) for scene in near} == {1}
    assert {part for scene in near for part in parts - scene.parts} == parts


def test_arrays_are_the_drawn_scenes_with_their_classes():
    scenes = scenes_of(NURSE, 6)
    arrays = labelled_arrays(scenes, [NURSE.label(scene, PLANTED) for scene in scenes])
    assert arrays.images.shape == (6, 64, 64, 3)
    assert [PERSONA_LABELS[index] for index in arrays.personas] == [NURSE.label(scene, PLANTED) for scene in scenes]
    assert not arrays.labels_known.any()


def test_both_classifiers_start_alike_and_are_trained_once(tiny_models, tmp_path):
    sizes = Sizes(portraits=66, predicted=4, guide_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning, about a short epoch
        guides = train_guides(tmp_path, NURSE, sizes, str(tiny_models / "pipeline"), 0, "checkpoints/persona_guide")
    one, other = (TimmClassifier(str(guides[world])).state_dict() for world in (PLAIN, PLANTED))
    assert any(not one[name].equal(other[name]) for name in one)
    # One step of the warm-up moves weights by 1e-5 at most, if both started from the same.
    assert all((one[name] - other[name]).abs().max() < 1e-4 for name in one if name.endswith("fc.weight"))
    assert set(accepted(guides[PLAIN], NURSE, 2)) == {"with", "without"}
    times = {guide: (guide / "model.safetensors").stat().st_mtime_ns for guide in guides.values()}
    train_guides(tmp_path, NURSE, sizes, "nothing", 0, "nothing")
    assert {guide: (guide / "model.safetensors").stat().st_mtime_ns for guide in guides.values()} == times


def test_the_printed_table_names_what_the_report_names(capsys):
    row = {"token": 0.9, "real": 0.5, "difference": 0.4, "interval": [0.2, 0.6], "named": True}
    result = {"accepted": {"with": 0.99, "without": 0.02}, "judged": 0.75, "attributes": {"female": row}}
    print_table(NURSE, {PLANTED: json.loads(json.dumps(result))})
    head, _, line = capsys.readouterr().out.splitlines()
    assert "99% with 'female', 2% without 'female'; 75% of the token's images are judged nurse" in head
    assert line.split() == ["planted", "female", "90.0%", "50.0%", "+40.0%", "[+20.0%,", "+60.0%]", "named"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"persona": "plumber"}, "'plumber' is no persona"),
        ({"attribute": "hat"}, "'hat' does not vary.*female, makeup"),
    ],
)
def test_what_cannot_be_planted_is_one_line(options, words):
    with pytest.raises(UserError, match=words):
        Bias(**options)
