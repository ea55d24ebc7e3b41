"""Even strengths: strengths of a token re-spaced, so that equal steps change an image equally.

An image that is edited at rising strength moves along a path. The length of the path between two strengths is the sum
of the distances between neighbours on a dense grid; inverted, it gives the strength at any length. The range ends
where the edited image is further from the unedited one than a bound.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from tokenlearn.errors import UserError

CALIBRATION = "calibration"
"""Entry of an embedding file that holds the calibration of its token."""

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """Strengths of a token by the change that they make.

    A calibrated strength is the length of the path from the unedited image, negative for negative strengths, in units
    of the longer side: the end of that side is 1 or -1, and equal steps are equal changes on both sides.

    Attributes:
        strengths: rising strengths of a grid, 0 among them.
        lengths: calibrated strength of each.
        bound: distance from the unedited image that the range ends at.
        unevenness: coefficient of variation of the distances between neighbours at equal steps of the strength, and at
            equal steps of the calibrated strength; None if it was not measured.
    """

    strengths: tuple[float, ...]
    lengths: tuple[float, ...]
    bound: float
    unevenness: tuple[float, float] | None = None

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest calibrated strength."""
        return self.lengths[0], self.lengths[-1]

    def strength(self, calibrated: float) -> float:
        """The strength to edit with at a calibrated strength.

        Raises:
            UserError: if the calibrated strength is out of range.
        """
        low, high = self.range
        if not low - 1e-9 <= calibrated <= high + 1e-9:
            raise UserError(
                f"calibrated strength {calibrated:g} is out of the range from {low:.3g} to {high:.3g}, where the edit "
                f"stays within the distance {self.bound:g}; stay in the range, or set calibrated to false"
            )
        return float(np.interp(calibrated, self.lengths, self.strengths))

    def to_json(self) -> str:
        """The calibration as the entry of a file."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, source: object = "the file") -> Calibration:
        """Read the entry of a file.

        Raises:
            UserError: if it is no calibration.
        """
        try:
            content = json.loads(text)
            strengths, lengths = (tuple(map(float, content[name])) for name in ("strengths", "lengths"))
            before_after = content.get("unevenness")
            measured = None if before_after is None else (float(before_after[0]), float(before_after[1]))
            found = cls(strengths, lengths, float(content["bound"]), measured)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise UserError(
                f"'{source}' has a calibration that cannot be read ({error}); calibrate it again"
            ) from None
        rising = all((np.diff(values) > 0).all() for values in (strengths, lengths))
        if not (len(strengths) == len(lengths) > 1 and rising and np.isfinite([*strengths, *lengths]).all()):
            raise UserError(f"the calibration of '{source}' does not rise; calibrate it again")
        return found


def calibrate_strengths(
    strengths: Sequence[float], steps: Sequence[float], distances: Sequence[float], bound: float
) -> Calibration:
    """Even strengths from the distances on a grid.

    Args:
        strengths: N rising strengths, 0 among them.
        steps: N - 1 distances between the images of neighbours.
        distances: N distances from the unedited image.
        bound: distance at which the range ends on either side, interpolated between strengths.

    Raises:
        UserError: if the strengths do not rise, 0 is not among them, a distance is negative or not finite, the bound
            is not positive, or nothing changes.
    """
    grid, parts, away = (np.asarray(values, dtype=np.float64) for values in (strengths, steps, distances))
    if len(parts) != len(grid) - 1 or len(away) != len(grid):
        raise ValueError(f"{len(grid)} strengths with {len(parts)} steps and {len(away)} distances")
    if not (np.diff(grid) > 0).all() or 0 not in grid:
        raise UserError(f"the strengths of a calibration must rise, and 0 must be among them, got {list(strengths)}")
    if not (np.isfinite([*parts, *away]).all() and min(*parts, *away) >= 0):
        raise UserError("a distance between edited images is not finite; use float32, or lower the highest strength")
    if not bound > 0:
        raise UserError(f"bound must be above 0, got {bound}")
    zero = int(np.flatnonzero(grid == 0)[0])
    length = np.concatenate([[0.0], np.cumsum(parts)])
    length -= length[zero]
    below = _within(grid[zero::-1], -length[zero::-1], away[zero::-1], bound)
    above = _within(grid[zero:], length[zero:], away[zero:], bound)
    longest = max(below[1][-1], above[1][-1])
    if not longest > 0:
        raise UserError("the token changes nothing at any of the strengths; try higher ones, or another token")
    points = [(strength, -at / longest) for strength, at in zip(*below, strict=True)][:0:-1]
    points += [(strength, at / longest) for strength, at in zip(*above, strict=True)]
    return Calibration(tuple(float(s) for s, _ in points), tuple(float(at) for _, at in points), float(bound))


def _within(grid: Numbers, length: Numbers, away: Numbers, bound: float) -> tuple[Numbers, Numbers]:
    """Strengths and lengths of one side, from 0 outwards: up to the bound, and where the path gets longer."""
    beyond = np.flatnonzero(away > bound)
    if len(beyond):
        end = int(beyond[0])
        share = (bound - away[end - 1]) / (away[end] - away[end - 1])
        grid, length = (
            np.append(values[:end], values[end - 1] + share * (values[end] - values[end - 1]))
            for values in (grid, length)
        )
    longer = np.append(True, np.diff(length) > 0)
    return grid[longer], length[longer]


def unevenness(steps: Sequence[float]) -> float:
    """Coefficient of variation of the distances between neighbours: their standard deviation over their mean."""
    values = np.asarray(steps, dtype=np.float64)
    return float(values.std() / values.mean()) if values.mean() > 0 else 0.0
