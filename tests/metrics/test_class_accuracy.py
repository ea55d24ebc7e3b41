import math

import pytest
import torch

from tokenlearn.metrics import ClassAccuracy, wilson_interval

Z_SQUARED = 1.959964**2


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        (8, 10, 0.490162, 0.943318),  # R: prop.test(8, 10, correct = FALSE)
        (0, 10, 0.0, Z_SQUARED / (10 + Z_SQUARED)),
        (10, 10, 10 / (10 + Z_SQUARED), 1.0),
        (1, 1, 1 / (1 + Z_SQUARED), 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(successes, total, low, high):
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=1e-5)


@pytest.mark.parametrize(("successes", "total"), [(1, 7), (16, 32), (95, 100)])
def test_the_ends_are_where_the_score_test_just_rejects(successes, total):
    share = successes / total
    for end in wilson_interval(successes, total):
        assert (share - end) ** 2 == pytest.approx(Z_SQUARED * end * (1 - end) / total)


def test_merged_parts_equal_one_pass():
    generator = torch.Generator().manual_seed(0)
    correct = torch.rand(50, generator=generator) < 0.7
    groups = torch.randint(3, (50,), generator=generator)  # the fourth group stays empty
    whole = ClassAccuracy(4)
    whole.update(correct, groups)
    parts = [ClassAccuracy(4), ClassAccuracy(4)]
    parts[0].update(correct[:20], groups[:20])
    parts[0].update(correct[20:30], groups[20:30])
    parts[1].update(correct[30:], groups[30:])
    parts[0].merge_state(parts[1])
    assert torch.equal(parts[0].compute(), whole.compute())
    for group in range(4):
        counted = correct[groups == group]
        assert whole.compute()[group].tolist() == [int(counted.sum()), len(counted)]


def test_an_interval_narrows_with_more_images():
    widths = [math.dist(*zip(wilson_interval(8 * n, 10 * n), strict=True)) for n in (1, 4, 16)]
    assert widths[0] > widths[1] > widths[2]
