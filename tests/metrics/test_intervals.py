import math

import pytest
import torch

from tokenlearn.metrics import (
    bootstrap_interval,
    holm_levels,
    share_difference_interval,
    share_difference_p_value,
    student_interval,
    two_way_bootstrap_interval,
    wilson_interval,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_bootstrap_of_a_mean_is_the_normal_interval_of_many_values():
    values = 3 + 2 * normal(400)
    half = 1.96 * values.std(correction=0).item() / math.sqrt(400)
    low, high = bootstrap_interval([values])
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert (high + low) / 2 == pytest.approx(values.mean().item(), abs=0.1 * half)
    assert bootstrap_interval([values]) == (low, high)
    narrow = bootstrap_interval([values], level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_groups_are_resampled_apart_and_count_alike():
    # Were the values pooled, the interval would be around 0.1 and wide.
    assert bootstrap_interval([torch.zeros(90), torch.ones(10)]) == (0.5, 0.5)
    assert bootstrap_interval([torch.tensor([2.0])]) == (2, 2)


def test_rows_and_columns_are_both_samples():
    assert two_way_bootstrap_interval(torch.full((3, 7), 0.25)) == (0.25, 0.25)
    runs, images = normal(40, 1), normal(1, 30, seed=1)
    low, high = two_way_bootstrap_interval(runs + images)
    variance = runs.var(correction=0) / 40 + images.var(correction=0) / 30
    assert high - low == pytest.approx(2 * 1.96 * variance.sqrt().item(), rel=0.06)
    # As one sample of 1200 values it would look six times as certain.
    one = bootstrap_interval([(runs + images).flatten()])
    assert high - low > 4 * (one[1] - one[0])


def test_newcombes_example():
    """Newcombe (1998), table II, method 10: 56/70 - 48/80 and 9/10 - 3/10."""
    assert share_difference_interval(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert share_difference_interval(9, 10, 3, 10) == pytest.approx((0.1705, 0.8090), abs=1e-4)
    assert share_difference_interval(0, 0, 3, 10) == (-1, 1)
    low, high = share_difference_interval(48, 80, 56, 70)
    assert (-high, -low) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_the_level_of_wilsons_interval():
    assert wilson_interval(3, 10) == pytest.approx(wilson_interval(3, 10, 0.95))
    wide, narrow = wilson_interval(3, 10, 0.99), wilson_interval(3, 10, 0.5)
    assert wide[0] < narrow[0] < 0.3 < narrow[1] < wide[1]
    # For half of n: (1 +- z / sqrt(n + z^2)) / 2, with z = 2.5758
    assert wilson_interval(50, 100, 0.99)[1] == pytest.approx(0.5 + 1.2879 / math.sqrt(100 + 6.6349), abs=1e-4)


@pytest.mark.parametrize("counts", [(56, 70, 48, 80), (3, 10, 9, 10), (10, 10, 0, 10), (5, 50, 4, 50)])
def test_the_p_value_is_the_level_at_which_the_interval_ends_at_zero(counts):
    p = share_difference_p_value(*counts)
    low, high = share_difference_interval(*counts, level=1 - p)
    assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-5)
    assert 0 < p < 1
    assert share_difference_p_value(5, 10, 50, 100) == share_difference_p_value(0, 0, 1, 2) == 1


def test_holms_steps():
    levels = holm_levels([0.03, 0.001, 0.04, 0.012], 0.05)
    # In order: .001 <= .05/4, .012 <= .05/3, .03 > .05/2, and all after it keep that level.
    assert levels == pytest.approx([0.025, 0.0125, 0.025, 0.05 / 3])
    assert holm_levels([]) == []
    assert holm_levels([0.01, 0.02, 0.04]) == pytest.approx([0.05 / 3, 0.025, 0.05])


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_students_interval_has_the_tabled_quantiles(freedom, quantile):
    values = [2.0, 4.0] + [3.0] * (freedom - 1)
    half = quantile * math.sqrt(2 / freedom / (freedom + 1))
    assert student_interval(values) == pytest.approx((3 - half, 3 + half), abs=2e-4)
    assert student_interval([5.0] * (freedom + 1)) == (5, 5)


def test_students_interval_at_another_level_and_of_too_few_values():
    assert student_interval([0.0, 2.0, 1.0], 0.9)[1] == pytest.approx(1 + 2.9200 / math.sqrt(3), abs=2e-4)
    with pytest.raises(ValueError, match="of 1 values"):
        student_interval([0.5])
