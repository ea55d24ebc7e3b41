import numpy as np
import pytest

from tokenlearn.evaluation.edit_protocol import DO_NOTHING, RECONSTRUCTION
from tokenlearn.evaluation.edit_table import edit_table
from tokenlearn.evaluation.equal_preservation import at_equal_preservation, success_at
from tokenlearn.evaluation.records import Record

DIRECTIONS, STRENGTHS = ["smile", "hat"], [1.0, 2.0]
LABELS = ["smile", "hat", "red"]


def unedited(images):
    """Round trips that change nothing."""
    for image in range(images):
        for name in DIRECTIONS:
            yield Record(RECONSTRUCTION, DO_NOTHING, side_of(image), "success", str(image), 0.0, None, name)
        for label in LABELS:
            yield Record(RECONSTRUCTION, DO_NOTHING, "", "kept", str(image), 1.0, None, label)


def edited(method, success, kept, images):
    """Edits with given shares of successes and of preserved labels at each strength, of every image alike."""
    for strength, share, of_labels in zip(STRENGTHS, success, kept, strict=True):
        for name in DIRECTIONS:
            for image in range(images):
                side = side_of(image)
                changed = float(image // 2 < share * images / 2)
                yield Record(method, name, side, "success", str(image), changed, strength)
                for place, label in enumerate(label for label in LABELS if label != name):
                    stays = float(image + 0.5 < of_labels[place] * images)
                    yield Record(method, name, side, "kept", str(image), stays, strength, label)


def side_of(image):
    return "add" if image % 2 else "remove"


def compared(records, methods, level=0.9, strengths=STRENGTHS):
    return at_equal_preservation(
        list(records), methods=methods, directions=DIRECTIONS, strengths=strengths, level=level
    )


def test_success_is_interpolated_where_the_share_falls():
    kept, success = np.array([1.0, 0.96, 0.9, 0.95]), np.array([0.0, 0.5, 0.8, 0.9])
    assert success_at(0.93, kept, success) == pytest.approx(0.65)  # at the first fall, not at the last strength
    assert success_at(0.98, kept, success) == pytest.approx(0.25)
    assert success_at(0.96, kept, success) == pytest.approx(0.5)
    assert success_at(0.5, kept, success) == 0.9
    assert success_at(1.1, kept, success) == 0
    both = success_at(0.93, np.stack([kept, kept - 0.03])[:, None], np.stack([success, success])[:, None])
    assert both.shape == (2, 1)
    assert both[:, 0] == pytest.approx([0.65, 0.5])


def test_methods_are_compared_at_one_share():
    images = 40
    records = [
        *unedited(images),
        *edited("caso", (0.5, 1.0), ((1.0, 0.9), (0.8, 0.8)), images),  # keeps 95 %, then 80 %
        *edited("direction", (0.6, 0.8), ((0.9, 0.9), (0.7, 0.7)), images),
        *edited("timid", (0.1, 0.2), ((1.0, 1.0), (0.95, 0.95)), images),
    ]
    cells = compared(records, ["caso", "direction", "timid"])
    assert list(cells) == ["caso", "direction", "caso minus direction"]
    for side in ("add", "remove"):
        assert cells["caso"][side].value == pytest.approx(0.5 + 0.5 / 3)  # a third of the way from 95 to 80 %
        assert cells["direction"][side].value == pytest.approx(0.6)
        assert cells["caso minus direction"][side].value == pytest.approx(0.5 + 0.5 / 3 - 0.6)
        assert cells["caso"][side].images == images
        for cell in (cells["caso"][side], cells["caso minus direction"][side]):
            assert cell.low < cell.value < cell.high
        apart = cells["caso"][side].high - cells["caso"][side].low
        apart += cells["direction"][side].high - cells["direction"][side].low
        assert cells["caso minus direction"][side].high - cells["caso minus direction"][side].low < apart
    assert compared(reversed(records), ["caso", "direction"], strengths=[2.0, 1.0])["caso"][
        "add"
    ].value == pytest.approx(cells["caso"]["add"].value)


def test_the_interval_covers_the_share_of_the_population():
    generator = np.random.default_rng(0)
    truth, covered = 0.6, 0
    for trial in range(40):
        succeeds = generator.random((60, 2)) < truth
        records = [*unedited(60)]
        for image, of_image in enumerate(succeeds):
            for name, changed in zip(DIRECTIONS, of_image, strict=True):
                records.append(Record("caso", name, "add", "success", str(image), float(changed), 1.0))
                for label in LABELS:
                    if label != name:
                        records.append(Record("caso", name, "add", "kept", str(image), float(image >= 12), 1.0, label))
        # From 100 to 80 %, 81 % are kept after 95 % of the way, up to the resample's share of the first 12 images.
        cell = at_equal_preservation(
            records, methods=["caso"], directions=DIRECTIONS, strengths=[1.0], level=0.81, seed=trial
        )["caso"]["add"]
        covered += cell.low <= truth * 0.95 <= cell.high
    assert covered >= 34


def test_a_method_that_a_side_lacks_or_that_never_gets_there_is_left_out():
    records = [*unedited(8), *edited("caso", (1.0, 1.0), ((0.5, 0.5), (0.25, 0.25)), 8)]
    added = [record for record in records if record.side != "remove"]
    assert list(compared(added, ["caso"])["caso"]) == ["add"]
    assert compared(records, ["caso"], level=0.1) == {}
    table = edit_table(
        records,
        title="edits",
        methods=["caso", "direction"],
        directions=DIRECTIONS,
        combinations=[],
        groups=[],
        strengths=STRENGTHS,
        strength=1.0,
        equal_preservation=0.9,
    )
    assert [row.name for row in table.rows][-1] == "caso at 90.0% preserved"
    assert table.notes == ["no strength of direction has 90.0% preserved"]
    assert table.summary["caso_add_at_equal_preservation"].value == pytest.approx(0.2)  # a fifth of the way
