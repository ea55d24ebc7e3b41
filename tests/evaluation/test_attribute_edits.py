import pytest
import torch

from tests.tiny import tiny_classifier
from tokenlearn.errors import UserError
from tokenlearn.evaluation.edit_protocol import Conditions, EditProtocol, background_error, directions_of
from tokenlearn.evaluation.edit_table import edit_table, success_at_equal_kept
from tokenlearn.evaluation.image_rows import ImageRows
from tokenlearn.evaluation.records import Records
from tokenlearn.models import Conditioning, TimmClassifier
from tokenlearn.models.attributes import resolve_attributes

LABELS = ["smile", "hat", "black", "brown", "red"]
ATTRIBUTES = {"smile": None, "hat": None, "hair": ["black", "brown", "red"]}
STRENGTHS, STRENGTH = [1.0, 3.0], 3.0


class World:
    """An editor for which an image is five numbers, one for each label; editing adds to them."""

    def invert(self, latents, source):
        return latents

    def denoise_towards(self, noisy, source, conditions, scales):
        edited = noisy.clone()
        for condition, scale in zip(conditions, scales, strict=True):
            directions = condition.prompt_embeds.reshape(len(condition), -1, 1, 1)
            edited = edited + scale.reshape(-1, 1, 1, 1) * directions
        return edited


class LossyWorld(World):
    """An editor that takes 2 from a hat in every image."""

    def denoise_towards(self, noisy, source, conditions, scales):
        return super().denoise_towards(noisy - towards(0, 2, 0, 0, 0).prompt_embeds.reshape(-1, 1, 1), source, [], [])


class Judge(TimmClassifier):
    """A judge for whom an image is five logits."""

    def forward(self, images):
        return images[:, :, 0, 0]

    def trunk_features(self, images):
        return images[:, None, :, 0, 0]


class JudgeOfModeration(Judge):
    """A judge who is less sure of a smile, the larger it is."""

    def forward(self, images):
        logits = super().forward(images).clone()
        logits[:, 0] = 0.5 - (logits[:, 0] - 1).abs()
        return logits


def towards(*values):
    return Conditioning(torch.tensor([[values]], dtype=torch.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_classifier(tmp_path_factory.mktemp("judge"), LABELS, multi_label=True))


class Measured:
    """A protocol with its records and its table."""

    def __init__(self, judge, conditions, *, groups=(), attributes=ATTRIBUTES, watched=(), **settings):
        self.groups, self.records, self.image_rows = groups, Records(), ImageRows()
        self.combinations = settings.pop("combinations", [])
        self.protocol = EditProtocol(
            editor=settings.pop("editor", World()),
            source=towards(*[0] * 5),
            conditions=conditions,
            attributes=resolve_attributes(attributes, judge),
            watched=resolve_attributes(dict.fromkeys(watched), judge),
            judge=judge,
            strengths=STRENGTHS,
            strength=STRENGTH,
            combinations=self.combinations,
            records=self.records,
            image_rows=self.image_rows,
            **({"removal": "negative"} | settings),
        )

    def measure(self, images, masks=None):
        self.protocol.measure(images, images, [str(index) for index in range(len(images))], masks or {})

    def table(self):
        return edit_table(
            self.records.compute(),
            title="edits",
            methods=self.protocol.methods,
            directions=[direction.name for direction in self.protocol.directions],
            combinations=self.combinations,
            groups=self.groups,
            strengths=STRENGTHS,
            strength=STRENGTH,
        )


@pytest.fixture
def make(folder):
    return lambda conditions, judge=Judge, **settings: Measured(judge(folder), conditions, **settings)


def images_of(*rows):
    return torch.tensor(rows, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 2, 2)


def cells(table):
    """Name of each row to the value of each column and its number of images."""
    return {
        row.name: {name: cell.value for name, cell in row.cells.items()}
        | {f"{name}_images": cell.images for name, cell in row.cells.items()}
        for row in table.rows
    }


def summary(table):
    return {name: figure.value for name, figure in table.summary.items()}


SMILE = Conditions(towards(1, 0, 0, 0, 0), None)
HAT = Conditions(towards(0, 1, 0, 0, 0), None)


class OtherEditor:
    """Stands for LEDITS++: it adds the scale of a direction to its logit."""

    def edit(self, images, scales):
        _, directions, strengths = scales.shape
        edited = images[:, None, None].repeat(1, directions, strengths, 1, 1, 1)
        for direction in range(directions):
            edited[:, direction, :, direction] += scales[:, direction, :, None, None]
        return edited


def test_an_editor_by_words_is_one_more_method(make):
    nothing = [Conditions(towards(0, 0, 0, 0, 0), None)] * 2
    measured = make({"ours": nothing}, attributes={"smile": None, "hat": None}, ledits=OtherEditor())
    measured.measure(images_of([-2, 4, 0, 0, 1], [2.5, -2, 0, 0, 1]))
    assert measured.protocol.methods == ["ours", "ledits pp"]
    table = measured.table()
    smile, hat = cells(table)["smile"], cells(table)["hat"]
    assert [smile[f"ledits_pp_{side}"] for side in ("add", "remove")] == [1, 1]
    assert [hat[f"ledits_pp_{side}"] for side in ("add", "remove")] == [1, 0]  # a hat of 4 outlasts strength 3
    assert summary(table)["ledits_pp_untouched_kept"] == 1
    assert summary(table)["add_success"] == 0


def test_the_background_is_what_an_attribute_does_not_decide(make):
    images = torch.zeros(1, 3, 2, 2)
    edited = torch.tensor([[0.4, 0.2], [0.0, 0.6]]).expand(1, 3, 2, 2)
    mask = torch.tensor([[[True, False], [False, False]]])
    assert background_error(edited, images, mask).tolist() == pytest.approx([(0.2 + 0.0 + 0.6) / 3])
    assert background_error(edited, images, torch.ones_like(mask)).isnan().all()

    masks = {"smile": torch.tensor([[[True, True], [True, False]]])}
    measured = make({"ours": [SMILE, HAT]}, attributes={"smile": None, "hat": None}, editor=LossyWorld())
    measured.measure(images_of([-2, -2, 0, 0, 1]), masks)
    table = measured.table()
    assert cells(table)["smile"]["background_error"] == pytest.approx(2 / 5)  # a hat of five channels changes by 2
    assert cells(table)["do nothing"]["background_error"] == pytest.approx(2 / 5)
    assert cells(table)["hat"]["background_error"] is None
    measured.measure(images_of([-2, -2, 0, 0, 1]))
    without = make({"ours": [SMILE, HAT]}, attributes={"smile": None, "hat": None})
    without.measure(images_of([-2, -2, 0, 0, 1]))
    assert "background_error" not in cells(without.table())["smile"]


def test_directions(folder):
    attributes = resolve_attributes({"smile": None, "hair": ["black", "brown", "red"]}, TimmClassifier(folder))
    named = [(direction.name, direction.attribute, direction.target) for direction in directions_of(attributes)]
    assert named == [("smile", 0, 1), ("black", 1, 0), ("brown", 1, 1), ("red", 1, 2)]


def test_success_and_untouched_attributes_by_hand(make):
    # The hat's direction takes the smile along; the second method does nothing.
    conditions = [SMILE, Conditions(towards(0.6, 1, 0, 0, 0), None)]
    nothing = [Conditions(towards(0, 0, 0, 0, 0), None)] * 2
    measured = make({"ours": conditions, "no edit": nothing}, attributes={"smile": None, "hat": None}, watched=["red"])
    measured.measure(images_of([-2, -2, 0, 0, 1], [-0.5, -4, 0, 0, 1], [2, 5, 0, 0, -1]))
    table = measured.table()
    smile, hat = cells(table)["smile"], cells(table)["hat"]
    assert (smile["add"], smile["add_images"], smile["remove"], smile["remove_images"]) == (1, 2, 1, 1)
    assert smile["untouched_kept"] == 1
    # At strength 3 the second image's hat is at -1 still, and the third one's at 2.
    assert (hat["add"], hat["add_images"], hat["remove"], hat["remove_images"]) == (0.5, 2, 0, 1)
    # The smile is lost or won in the second image (to 1.3) but not in the first (to -0.2) or third (to 0.2).
    assert hat["untouched_kept"] == pytest.approx(5 / 6)
    found = summary(table)
    assert found["add_success"] == pytest.approx(0.75)
    assert found["remove_success"] == pytest.approx(0.5)
    assert found["untouched_kept"] == pytest.approx((1 + 5 / 6) / 2)
    assert found["no_edit_add_success"] == 0
    assert found["no_edit_untouched_kept"] == 1
    # Nothing leaves as much untouched as no edit, at any strength but the weakest.
    assert "no_edit_success_at_equal_kept" not in found
    assert found["rank_correlation"] == pytest.approx(1, abs=1e-4)
    assert found["both_sides_rank_correlation"] == pytest.approx(1, abs=1e-4)
    assert [len(points) for points in table.curves.values()] == [2, 2]
    assert smile["psnr"] == pytest.approx(-10 * torch.log10(torch.tensor(9 / 5)).item(), abs=1e-4)
    assert {caption for caption, _ in measured.image_rows.rows()} == {"image", "smile", "hat"}


def test_doing_nothing_is_a_row_by_hand(make):
    measured = make(
        {"ours": [SMILE, HAT]}, attributes={"smile": None, "hat": None}, watched=["red"], editor=LossyWorld()
    )
    measured.measure(images_of([-1, 1, 0, 0, 1], [-1, 5, 0, 0, 1], [2, -1, 0, 0, 1]))
    row = cells(measured.table())["do nothing"]
    # The first image loses its hat; all other classes stay.
    assert (row["add"], row["add_images"]) == (0, 3)
    assert (row["remove"], row["remove_images"]) == (1 / 3, 3)
    assert row["untouched_kept"] == pytest.approx(8 / 9)
    assert row["perceptual_distance"] > 0
    assert summary(measured.table())["reconstruction_untouched_kept"] == pytest.approx(8 / 9)


def test_records_name_the_image_the_strength_and_the_judged_label(make):
    measured = make(
        {"ours": [SMILE, Conditions(towards(0.6, 1, 0, 0, 0), None)]}, attributes={"smile": None, "hat": None}
    )
    measured.measure(images_of([-0.5, -4, 0, 0, 1]))
    changed = [
        (record.seed, record.item, record.side, record.strength, record.label)
        for record in measured.records.compute()
        if record.measure == "kept" and not record.value
    ]
    assert changed == [("0", "hat", "add", 1.0, "smile"), ("0", "hat", "add", 3.0, "smile")]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (0.9, (0.6, 0.5)),  # both between two strengths
        (0.8, (0.8, 0.7)),  # the other method never changes so much: its largest strength
        (0.99, (0.2, 0.1)),
    ],
)
def test_success_is_compared_at_one_untouched_share(wanted, expected):
    tested, other = [(0.95, 0.4), (1.0, 0.0), (0.85, 0.8)], [(0.85, 0.7), (0.95, 0.3), (0.975, 0.1)]
    assert success_at_equal_kept(tested, other, wanted) == pytest.approx(expected)
    assert success_at_equal_kept(tested, [(0.5, 1.0), (0.8, 0.2)], wanted) is None


def test_rank_correlation_is_of_the_side_that_an_image_needs(make):
    measured = make({"ours": [SMILE]}, judge=JudgeOfModeration, attributes={"smile": None})
    # Where a smile is present already, more of it makes the judge less sure; so does less of it.
    measured.measure(images_of([1, 0, 0, 0, 1], [-9, 0, 0, 0, 1]))
    found = summary(measured.table())
    assert found["rank_correlation"] == pytest.approx(1, abs=1e-4)
    assert found["both_sides_rank_correlation"] < 0.9


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
def test_ways_to_remove(make, removal, scale, after):
    conditions = [Conditions(towards(1, 0, 0, 0, 0), towards(0, -1, 0, 0, 0))]
    protocol = make({"ours": conditions}, attributes={"smile": None}, removal=removal).protocol
    edited = protocol.edit(images_of([2, 0, 0, 0, 0]), [(conditions[0], torch.tensor([scale]))])
    assert edited[0, :2, 0, 0].tolist() == after


def test_classes_of_many_and_transfer_by_group(make):
    hair = [Conditions(towards(0, 0, *[5 * (index == target) for index in range(3)]), None) for target in range(3)]
    measured = make(
        {"ours": hair}, groups=("sketch", "night", "photo"), attributes={"hair": ["black", "brown", "red"]}
    )
    images = images_of([0, 0, 2, 1, 0], [0, 0, 0, 9, 30])
    measured.measure(images)
    measured.protocol.measure_transfer(images, images, ["a", "b"], ["sketch", "night"])
    table = measured.table()
    rows = cells(table)
    assert list(rows) == ["black", "brown", "red", "do nothing", "sketch", "night"]
    assert (rows["black"]["add"], rows["black"]["add_images"], rows["black"]["remove_images"]) == (0, 1, 1)
    assert (rows["red"]["add"], rows["red"]["add_images"], rows["red"]["remove"]) == (1, 1, 0)
    assert summary(table)["transfer_sketch"] == 1
    assert summary(table)["transfer_night"] == 0
    assert rows["sketch"].keys() == {"add", "add_images", "remove", "remove_images"}


def test_combinations_change_everything_at_once(make):
    combinations = [["smile", "hat"], ["hat"]]
    measured = make({"ours": [SMILE, HAT]}, attributes={"smile": None, "hat": None}, combinations=combinations)
    measured.measure(images_of([-1, 1, 0, 0, 0], [-1, 5, 0, 0, 0]))
    table = measured.table()
    found = summary(table)
    assert found["combination_1_all"] == 0.5
    assert found["combination_1_each"] == 0.75
    assert found["combination_2_all"] == 0.5
    assert [row.name for row in table.rows[2:]] == ["do nothing", "smile + hat", "hat"]
    assert cells(table)["smile + hat"] == {"add": 0.5, "add_images": 2}


def test_unknown_combinations_are_named(make):
    with pytest.raises(UserError, match=r"'scarf'.*smile, hat"):
        make({"ours": [SMILE, HAT]}, attributes={"smile": None, "hat": None}, combinations=[["scarf"]])
