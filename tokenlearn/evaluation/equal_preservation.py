"""Success of several ways to edit where all of them preserve the same share of the other attributes.

A stronger edit succeeds more often and preserves less, so successes at one strength, or at one strength each, compare
nothing. Here each method is taken at the strength, between those that were tried, at which it preserves the share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenlearn.evaluation.edit_protocol import DO_NOTHING, RECONSTRUCTION
from tokenlearn.evaluation.records import Record
from tokenlearn.evaluation.table import Cell

SIDES = ("add", "remove")
_RESAMPLES = 2000

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class _Counts:
    """Records of a method: sums and numbers at T strengths, the first of them 0, for D directions and I images.

    Attributes:
        changed: (T, sides, D, I) edits that succeeded.
        edits: (T, sides, D, I) edits.
        kept: (T, D, I) other attributes that stayed.
        others: (T, D, I) other attributes.
    """

    changed: Numbers
    edits: Numbers
    kept: Numbers
    others: Numbers

    def shares(self, weights: Numbers) -> tuple[Numbers, Numbers]:
        """Success (R, sides, T) and preserved share (R, T), means over directions, with weights (R, I) of images."""
        success = _mean_share(self.changed @ weights.T, self.edits @ weights.T)
        return success.transpose(2, 1, 0), _mean_share(self.kept @ weights.T, self.others @ weights.T).T


def _mean_share(sums: Numbers, totals: Numbers) -> Numbers:
    """Mean (..., R) over directions of shares (..., D, R), those without records left out; NaN without any."""
    counted = totals > 0
    shares = np.where(counted, sums / np.where(counted, totals, 1), 0).sum(axis=-2)
    number = counted.sum(axis=-2)
    return np.where(number > 0, shares / np.maximum(number, 1), np.nan)


def at_equal_preservation(
    records: Sequence[Record],
    *,
    methods: Sequence[str],
    directions: Sequence[str],
    strengths: Sequence[float],
    level: float,
    seed: int = 0,
) -> dict[str, dict[str, Cell]]:
    """Successful edits of each method, and of the first minus each other, at one share of preserved attributes.

    Intervals are percentile bootstraps over images, the same resamples for all methods, so differences are paired.

    Args:
        records: of the measures ``success`` and ``kept``, with those of images that are denoised without an edit.
        methods: compared methods, first the tested one.
        directions: directions of the edits, over which shares are averaged.
        strengths: strengths that were tried; 0 is added.
        level: preserved share.
        seed: of the resamples.

    Returns:
        Method, or ``FIRST minus OTHER``, to the cells ``add`` and ``remove``, of the sides that were edited. A method
        that preserves more at every strength, or less even without an edit, is left out.
    """
    images = list(dict.fromkeys(record.seed for record in records if record.measure in ("success", "kept")))
    generator = np.random.default_rng(seed)
    resamples = generator.multinomial(len(images), [1 / len(images)] * len(images), size=_RESAMPLES).astype(float)
    weights = np.concatenate([np.ones((1, len(images))), resamples])
    found: dict[str, tuple[Numbers, Numbers]] = {}
    for method in methods:
        counts = _counts(records, method, directions, sorted(strengths), images)
        success, kept = counts.shares(weights)
        if kept[0, 0] >= level and (kept[0] < level).any():
            found[method] = success_at(level, kept[:, None], success), counts.edits[-1].sum(axis=(1, 2))
    cells = {method: _cells(values, edits) for method, (values, edits) in found.items()}
    first = methods[0]
    if first in found:
        cells |= {
            f"{first} minus {method}": _cells(found[first][0] - values, edits)
            for method, (values, edits) in found.items()
            if method != first
        }
    return cells


def success_at(level: float, kept: Numbers, success: Numbers) -> Numbers:
    """Success at the first strength at which the preserved share falls to a level, linear between strengths.

    Args:
        level: preserved share.
        kept: (..., T) preserved shares at rising strength.
        success: (..., T) success at the same.

    Returns:
        (...). Where the share never falls below the level, success at the last strength; where it begins there, at
        the first.
    """
    kept, success = np.broadcast_arrays(kept, success)
    below = kept < level
    after = np.where(below.any(axis=-1), below.argmax(axis=-1), kept.shape[-1] - 1)[..., None]
    before = np.maximum(after - 1, 0)

    def at(values: Numbers, place: NDArray[np.int64]) -> Numbers:
        return np.take_along_axis(values, place, axis=-1)[..., 0]

    fall = at(kept, before) - at(kept, after)
    way = np.where(fall > 0, (at(kept, before) - level) / np.where(fall > 0, fall, 1.0), 1.0).clip(0, 1)
    return (1 - way) * at(success, before) + way * at(success, after)


def _cells(values: Numbers, edits: Numbers) -> dict[str, Cell]:
    """Cells of both sides, from values (1 + R, sides) of all images and of the resamples."""
    cells = {}
    for side, name in enumerate(SIDES):
        if not np.isnan(values[0, side]):
            low, high = np.nanquantile(values[1:, side], [0.025, 0.975])
            cells[name] = Cell(float(values[0, side]), float(low), float(high), round(float(edits[side])))
    return cells


def _counts(
    records: Sequence[Record],
    method: str,
    directions: Sequence[str],
    strengths: Sequence[float],
    images: Sequence[int | str],
) -> _Counts:
    """Sums and numbers of a method's records; those without an edit are of strength 0."""
    places: Mapping[Any, int] = {image: index for index, image in enumerate(images)}
    steps = {strength: 1 + index for index, strength in enumerate(strengths)}
    rows = {name: index for index, name in enumerate(directions)}
    shape = (1 + len(strengths), len(directions), len(images))
    changed, edits = (np.zeros((shape[0], len(SIDES), *shape[1:])) for _ in range(2))
    kept, others = np.zeros(shape), np.zeros(shape)
    labels: dict[str, set[str]] = {name: set() for name in directions}
    for record in records:
        if record.method != method or record.item not in rows or record.strength not in steps:
            continue
        step, row, image = steps[record.strength], rows[record.item], places[record.seed]
        if record.measure == "success":
            changed[step, SIDES.index(record.side), row, image] += record.value
            edits[step, SIDES.index(record.side), row, image] += 1
        elif record.measure == "kept":
            labels[record.item].add(record.label)
            kept[step, row, image] += record.value
            others[step, row, image] += 1
    for record in records:
        if record.method != RECONSTRUCTION or record.item != DO_NOTHING:
            continue
        image = places[record.seed]
        if record.measure == "success" and record.label in rows:
            changed[0, SIDES.index(record.side), rows[record.label], image] += record.value
            edits[0, SIDES.index(record.side), rows[record.label], image] += 1
        elif record.measure == "kept":
            for name, row in rows.items():
                if record.label in labels[name]:
                    kept[0, row, image] += record.value
                    others[0, row, image] += 1
    return _Counts(changed, edits, kept, others)
