"""Intervals of means and of differences, and what is left of them where many are looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from tokenlearn.metrics.class_accuracy import wilson_interval

_RESAMPLES = 2000


def bootstrap_interval(
    groups: Sequence[Tensor], *, level: float = 0.95, resamples: int = _RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of the means of groups (Efron, 1979).

    Args:
        groups: (N_g,) values, at least one, of each group, such as the sides of an edit. They are resampled apart.
        level: of the interval.
        resamples: number of resamples.
        seed: of the resamples, so that a table is the same again.

    Returns:
        Lower and upper end; equal for one value a group.
    """
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(resamples, dtype=torch.double)
    for values in groups:
        chosen = torch.randint(len(values), (resamples, len(values)), generator=generator)
        means += values.double().cpu()[chosen].mean(dim=1) / len(groups)
    return _percentiles(means, level)


def two_way_bootstrap_interval(
    values: Tensor, *, level: float = 0.95, resamples: int = _RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of a table whose rows and columns are both samples.

    Rows and columns are resampled independently (Owen, 2007, https://arxiv.org/abs/0711.0829), as runs and the images
    that all of them are tested on need it: values of one image, or of one run, are not independent.

    Args:
        values: (R, C), such as differences for R runs and C images.
        level: of the interval.
        resamples: number of resamples.
        seed: of the resamples.

    Returns:
        Lower and upper end.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = values.shape
    table = values.double().cpu()
    means = torch.stack(
        [
            table[torch.randint(rows, (rows,), generator=generator)][
                :, torch.randint(columns, (columns,), generator=generator)
            ].mean()
            for _ in range(resamples)
        ]
    )
    return _percentiles(means, level)


def student_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of a few independent values, such as figures of several training seeds.

    Args:
        values: at least two.
        level: of the interval.

    Returns:
        Lower and upper end. For shares they may leave [0, 1].

    Raises:
        ValueError: for fewer than two values.
    """
    count = len(values)
    if count < 2:
        raise ValueError(f"an interval of {count} values; give two or more")
    mean = sum(values) / count
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = _student_quantile(level, count - 1) * deviation / math.sqrt(count)
    return mean - half, mean + half


def _student_quantile(level: float, freedom: int) -> float:
    """The deviation that Student's t stays within with a probability, by bisection."""
    inside, outside = 0.0, 1.0
    while _within(outside, freedom) < level:
        inside, outside = outside, 2 * outside
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if _within(middle, freedom) < level else (inside, middle)
    return outside


def _within(deviation: float, freedom: int) -> float:
    """Probability that Student's t stays within a deviation (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(deviation / math.sqrt(freedom))
    odd = freedom % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * power / (power + 1)
    series = math.sin(angle) * total
    return 2 / math.pi * (angle + series) if odd else series


def _percentiles(means: Tensor, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.double)).tolist()
    return low, high


def share_difference_interval(
    successes: int, total: int, other_successes: int, other_total: int, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the difference of two shares, the first minus the second (Newcombe, 1998, method 10).

    It is made of the Wilson intervals of both, and so holds near 0 and 1.

    Args:
        successes: of the first sample.
        total: size of the first sample.
        other_successes: of the second sample.
        other_total: size of the second sample.
        level: of the interval.

    Returns:
        Lower and upper end in [-1, 1]; (-1, 1) if a sample is empty.
    """
    if not total or not other_total:
        return -1.0, 1.0
    share, other = successes / total, other_successes / other_total
    low, high = wilson_interval(successes, total, level)
    other_low, other_high = wilson_interval(other_successes, other_total, level)
    difference = share - other
    return (
        difference - math.hypot(share - low, other_high - other),
        difference + math.hypot(high - share, other - other_low),
    )


def share_difference_p_value(successes: int, total: int, other_successes: int, other_total: int) -> float:
    """Smallest error level at which :func:`share_difference_interval` leaves 0 out; 1 for equal shares."""
    if not total or not other_total or successes * other_total == other_successes * total:
        return 1.0

    def leaves_zero_out(z: float) -> bool:
        level = 1 - 2 * NormalDist().cdf(-z)
        low, high = share_difference_interval(successes, total, other_successes, other_total, level)
        return low > 0 or high < 0

    # Beyond eight deviations, the level cannot be told from 1 in a double.
    inside, outside = 0.0, 8.0
    for _ in range(50):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if leaves_zero_out(middle) else (inside, middle)
    return 2 * NormalDist().cdf(-inside)


def holm_levels(p_values: Sequence[float], level: float = 0.05) -> list[float]:
    """Error level of each of several tests, such that any true one is rejected with probability ``level`` at most.

    Holm's step-down (1979): the i-th smallest p-value is compared with ``level / (m - i)``, until one is larger; those
    after it are compared with the same. A test is rejected if its p-value is at most its level.

    Args:
        p_values: of m tests.
        level: of all together.
    """
    levels, current, rejecting = [level] * len(p_values), level, True
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        if rejecting:
            current = level / (len(p_values) - rank)
            rejecting = p_values[index] <= current
        levels[index] = current
    return levels
