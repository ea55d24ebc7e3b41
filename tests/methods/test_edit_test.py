import pytest
import torch

from tests.tiny import tiny_classifier
from tokenlearn.errors import UserError
from tokenlearn.methods.attributes import resolve_attributes
from tokenlearn.methods.edit_test import Conditions, EditTally, EditTest, directions_of, success_at_equal_kept
from tokenlearn.models import Conditioning, TimmClassifier

LABELS = ["smile", "hat", "black", "brown", "red"]
ATTRIBUTES = {"smile": None, "hat": None, "hair": ["black", "brown", "red"]}


class World:
    """An editor and a judge for which a picture is five numbers, one for each label; editing adds to them."""

    def __init__(self):
        self.calls = []

    def invert(self, latents, unconditional):
        return latents

    def denoise(self, noisy, unconditional, conditionals, scales):
        self.calls.append(len(noisy))
        edited = noisy.clone()
        for conditional, scale in zip(conditionals, scales, strict=True):
            directions = conditional.prompt_embeds.reshape(len(conditional), -1, 1, 1)
            edited = edited + scale.reshape(-1, 1, 1, 1) * directions
        return edited


class Judge(TimmClassifier):
    def forward(self, images):
        return images[:, :, 0, 0]

    def trunk_features(self, images):
        return images[:, None, :, 0, 0]


def towards(*values):
    return Conditioning(torch.tensor([[values]], dtype=torch.float32))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    tiny_classifier(folder, LABELS, multi_label=True)
    return Judge(str(folder))


@pytest.fixture
def tally(judge):
    def make(methods, groups=(), attributes=ATTRIBUTES, watched=(), **settings):
        resolved = resolve_attributes(attributes, judge)
        others = resolve_attributes(dict.fromkeys(watched), judge)
        options = {"strengths": [1.0, 3.0], "strength": 3.0} | settings
        return EditTally(EditTest(**options), World(), towards(*[0] * 5), methods, resolved, others, judge, groups)

    return make


def pictures(*rows):
    return torch.tensor(rows, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 2, 2)


SMILE = Conditions(towards(1, 0, 0, 0, 0), None)
HAT = Conditions(towards(0, 1, 0, 0, 0), None)


def test_directions():
    class Two:
        class_names = ("no smile", "smile")
        classes = (0, 1)

    class Three:
        class_names = ("black", "brown", "red")
        classes = (0, 1, 2)

    named = [(direction.name, direction.attribute, direction.target) for direction in directions_of([Two, Three])]
    assert named == [("smile", 0, 1), ("black", 1, 0), ("brown", 1, 1), ("red", 1, 2)]


def test_success_and_what_is_kept_by_hand(tally):
    # The hat's direction takes the smile along; the second method does nothing.
    conditions = [SMILE, Conditions(towards(0.6, 1, 0, 0, 0), None)]
    nothing = [Conditions(towards(0, 0, 0, 0, 0), None)] * 2
    made = tally({"ours": conditions, "no edit": nothing}, attributes={"smile": None, "hat": None}, watched=["red"])
    images = pictures([-2, -2, 0, 0, 1], [-0.5, -4, 0, 0, 1], [2, 5, 0, 0, -1])
    made.update(images, images)
    report = made.report()
    rows = {row[0]: dict(zip(report.columns, row, strict=True)) for row in report.rows}
    smile, hat = rows["smile"], rows["hat"]
    assert (smile["add"], smile["add_images"], smile["remove"], smile["remove_images"]) == (1, 2, 1, 1)
    assert smile["untouched_kept"] == 1
    # At strength 3 the second picture's hat is at -1 still, and the third one's at 2.
    assert (hat["add"], hat["add_images"], hat["remove"], hat["remove_images"]) == (0.5, 2, 0, 1)
    # The smile is lost or won in the second picture (to 1.3) but not in the first (to -0.2) or third (to 0.2).
    assert hat["untouched_kept"] == pytest.approx(5 / 6)
    assert report.summary["add_success"] == pytest.approx(0.75)
    assert report.summary["remove_success"] == pytest.approx(0.5)
    assert report.summary["untouched_kept"] == pytest.approx((1 + 5 / 6) / 2)
    assert report.summary["no_edit_add_success"] == 0
    assert report.summary["no_edit_untouched_kept"] == 1
    # Nothing keeps as much as no edit at any strength but the weakest.
    assert "no_edit_success_at_equal_kept" not in report.summary
    assert report.summary["rank_correlation"] == pytest.approx(1, abs=1e-4)
    assert report.summary["both_sides_rank_correlation"] == pytest.approx(1, abs=1e-4)
    assert [len(points) for points in report.curves.values()] == [2, 2]
    assert smile["psnr"] == pytest.approx(-10 * torch.log10(torch.tensor(9 / 5)).item(), abs=1e-4)
    assert {caption for caption, _ in report.pictures["edits"]} == {"picture", "smile", "hat"}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (0.9, (0.6, 0.5)),  # both between two strengths
        (0.8, (0.8, 0.7)),  # the other method never keeps so little: the least that it keeps
        (0.99, (0.2, 0.1)),
    ],
)
def test_success_at_equal_kept_is_of_one_share(wanted, expected):
    own, other = [(0.95, 0.4), (1.0, 0.0), (0.85, 0.8)], [(0.85, 0.7), (0.95, 0.3), (0.975, 0.1)]
    assert success_at_equal_kept(own, other, wanted) == pytest.approx(expected)
    assert success_at_equal_kept(own, [(0.5, 1.0), (0.8, 0.2)], wanted) is None


def test_rank_correlation_is_of_the_side_that_a_picture_needs(tally):
    made = tally({"ours": [SMILE]}, attributes={"smile": None})
    scores = made._scores
    # Where a smile is there already, more of it makes the judge less sure.
    made._scores = lambda images, direction: -(scores(images, direction) - 1).abs()
    images = pictures([1, 0, 0, 0, 1], [-9, 0, 0, 0, 1])
    made.update(images, images)
    summary = made.report().summary
    assert summary["rank_correlation"] == pytest.approx(1, abs=1e-4)
    assert summary["both_sides_rank_correlation"] < 0.9


@pytest.mark.parametrize(
    ("removal", "scale", "after"),
    [
        ("negative", -3.0, [-1.0, 0.0]),
        ("negative", 3.0, [5.0, 0.0]),
        ("opposite", -3.0, [2.0, -3.0]),
        ("opposite", 3.0, [5.0, 0.0]),
        ("difference", -3.0, [0.5, -1.5]),
        ("difference", 3.0, [5.0, 0.0]),
    ],
)
def test_ways_to_remove(tally, removal, scale, after):
    conditions = [Conditions(towards(1, 0, 0, 0, 0), towards(0, -1, 0, 0, 0))]
    made = tally({"ours": conditions}, attributes={"smile": None}, removal=removal)
    edited = made.edit(pictures([2, 0, 0, 0, 0]), [(conditions[0], torch.tensor([scale]))])
    assert edited[0, :2, 0, 0].tolist() == after


def test_classes_of_many_and_transfer_by_group(tally):
    hair = [Conditions(towards(0, 0, *[5 * (index == own) for index in range(3)]), None) for own in range(3)]
    made = tally({"ours": hair}, groups=("sketch", "night"), attributes={"hair": ["black", "brown", "red"]})
    images = pictures([0, 0, 2, 1, 0], [0, 0, 0, 9, 30])
    made.update(images, images)
    made.update_transfer(images, images, torch.tensor([0, 1]))
    report = made.report()
    rows = {row[0]: dict(zip(report.columns, row, strict=True)) for row in report.rows}
    assert list(rows) == ["black", "brown", "red", "sketch", "night"]
    assert (rows["black"]["add"], rows["black"]["add_images"], rows["black"]["remove_images"]) == (0, 1, 1)
    assert (rows["red"]["add"], rows["red"]["add_images"], rows["red"]["remove"]) == (1, 1, 0)
    assert report.summary["transfer_sketch"] == 1
    assert report.summary["transfer_night"] == 0
    assert rows["sketch"]["untouched_kept"] is None


def test_combinations_flip_everything_at_once(tally):
    made = tally(
        {"ours": [SMILE, HAT]}, attributes={"smile": None, "hat": None}, combinations=[["smile", "hat"], ["hat"]]
    )
    images = pictures([-1, 1, 0, 0, 0], [-1, 5, 0, 0, 0])
    made.update(images, images)
    report = made.report()
    assert report.summary["combination_1_all"] == 0.5
    assert report.summary["combination_1_each"] == 0.75
    assert report.summary["combination_2_all"] == 0.5
    assert [row[0] for row in report.rows[2:]] == ["smile + hat", "hat"]


def test_bad_settings(tally):
    with pytest.raises(UserError, match=r"strength 5 is not among model.test.strengths"):
        EditTest(strengths=[1, 2], strength=5)
    with pytest.raises(UserError, match=r"must be positive numbers, at least one, got \[\]"):
        EditTest(strengths=[])
    with pytest.raises(UserError, match=r"has 'scarf', which is not learned; it may be smile, hat"):
        tally({"ours": [SMILE, HAT]}, attributes={"smile": None, "hat": None}, combinations=[["scarf"]])
