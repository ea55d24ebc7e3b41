"""The table of edits of attributes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tokenlearn.evaluation.edit_protocol import DO_NOTHING, RECONSTRUCTION
from tokenlearn.evaluation.equal_preservation import at_equal_preservation
from tokenlearn.evaluation.records import Record
from tokenlearn.evaluation.table import Column, Figure, Kind, Pivot, Row, Table

_SIDES = ("add", "remove")
_RANKS = ("rank_correlation", "both_sides_rank_correlation")
_SIDE_EFFECTS: dict[str, tuple[str, Kind]] = {
    "untouched_kept": ("kept", "share"),
    "psnr": ("psnr", "decibels"),
    "perceptual_distance": ("perceptual_distance", "distance"),
    "background_error": ("background_error", "distance"),
}
"""Column to its measure and kind. Background errors are of drawn images alone."""


def edit_table(
    records: Sequence[Record],
    *,
    title: str,
    methods: Sequence[str],
    directions: Sequence[str],
    combinations: Sequence[Sequence[str]],
    groups: Sequence[str],
    strengths: Sequence[float],
    strength: float,
    equal_preservation: float | None = None,
) -> Table:
    """The table of :class:`tokenlearn.evaluation.attribute_edits.AttributeEdits`.

    Args:
        records: all records.
        title: title of the table.
        methods: compared methods, first the tested one.
        directions: rows of the directions.
        combinations: rows of the directions that are edited together.
        groups: rows of other groups of images, those that have records.
        strengths: strengths of the curves.
        strength: strength of the table.
        equal_preservation: preserved share at which methods are compared; None for no such rows.
    """
    tested = methods[0]
    measured = {record.measure for record in records}
    side_effects = [name for name, (measure, _) in _SIDE_EFFECTS.items() if measure in measured]
    columns = [column for method in methods for column in _columns(method, tested, strength, side_effects)]
    columns += [Column(name=rank, kind="correlation", measure=rank, method=tested) for rank in _RANKS]
    pivot = Pivot(records, directions, columns)
    summary: dict[str, Figure] = {}
    for method in methods:
        prefix = _prefix(method, tested)
        summary |= {f"{prefix}{side}_success": pivot.figure(f"{prefix}{side}") for side in _SIDES}
        summary |= {f"{prefix}{name}": pivot.figure(f"{prefix}{name}") for name in side_effects}
    summary |= {rank: pivot.figure(rank) for rank in _RANKS}
    nothing = list(_columns(RECONSTRUCTION, RECONSTRUCTION, None, side_effects))
    reconstruction = Pivot(records, [DO_NOTHING], nothing)
    summary |= {f"reconstruction_{name}": reconstruction.figure(name) for name in side_effects}
    curves = {method: _curve(records, method, directions, strengths) for method in methods}
    summary |= _at_equal_kept(curves, tested, summary["untouched_kept"].value)
    rows = pivot.rows() + reconstruction.rows()
    rows += _transfer_rows(records, groups, directions, tested, summary)
    rows += _combination_rows(records, combinations, tested, summary)
    notes: list[str] = []
    if equal_preservation is not None:
        rows += _equal_rows(records, methods, directions, strengths, equal_preservation, summary, notes)
    return Table(
        title=title, heading="direction", columns=columns, rows=rows, summary=summary, curves=curves, notes=notes
    )


def _prefix(method: str, tested: str) -> str:
    return "" if method == tested else f"{method.replace(' ', '_')}_"


def _columns(method: str, tested: str, strength: float | None, side_effects: Sequence[str]) -> Iterator[Column]:
    """Success of both sides, and side effects, of a method."""
    prefix = _prefix(method, tested)
    for side in _SIDES:
        name, bar = f"{prefix}{side}", method == tested
        yield _success(name, "success", method, side=side, strength=strength, bar=bar)
    for name in side_effects:
        measure, kind = _SIDE_EFFECTS[name]
        yield Column(name=f"{prefix}{name}", kind=kind, measure=measure, method=method, strength=strength)


def _success(
    name: str,
    measure: str,
    method: str,
    *,
    side: str | None = None,
    strength: float | None = None,
    label: str | None = None,
    bar: bool = False,
) -> Column:
    return Column(
        name=name,
        kind="share",
        measure=measure,
        method=method,
        side=side,
        strength=strength,
        label=label,
        interval=True,
        bar=bar,
    )


def _curve(
    records: Sequence[Record], method: str, directions: Sequence[str], strengths: Sequence[float]
) -> list[tuple[float, float]]:
    """Shares (untouched, success) of a method at rising strength."""
    points = []
    for strength in strengths:
        kept = Column(name="kept", kind="share", measure="kept", method=method, strength=strength)
        sides = [_success(side, "success", method, side=side, strength=strength) for side in _SIDES]
        pivot = Pivot(records, directions, [kept, *sides])
        points.append((pivot.mean_share(["kept"]), pivot.mean_share(_SIDES)))
    return points


def _at_equal_kept(
    curves: dict[str, list[tuple[float, float]]], tested: str, kept: float
) -> Iterator[tuple[str, Figure]]:
    """Success of the tested and of each other method where both leave an equal share untouched."""
    for method, curve in curves.items():
        if method != tested and (found := success_at_equal_kept(curves[tested], curve, kept)) is not None:
            key = method.replace(" ", "_")
            yield f"success_at_kept_of_{key}", Figure(found[0], "share")
            yield f"{key}_success_at_equal_kept", Figure(found[1], "share")


def success_at_equal_kept(
    tested: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]], wanted: float
) -> tuple[float, float] | None:
    """Success of two methods where both leave an equal share of other attributes untouched.

    The share is the closest to ``wanted`` that both methods reach; between strengths, success is interpolated.

    Args:
        tested: (untouched, success) at rising strength.
        other: (untouched, success) of the other method.
        wanted: untouched share.

    Returns:
        Success of both, or None if no share is reached by both.
    """
    curves = [np.array(sorted(points)) for points in (tested, other)]
    lowest, highest = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
    if lowest > highest:
        return None
    level = np.clip(wanted, lowest, highest)
    first, second = (float(np.interp(level, curve[:, 0], curve[:, 1])) for curve in curves)
    return first, second


def _equal_rows(
    records: Sequence[Record],
    methods: Sequence[str],
    directions: Sequence[str],
    strengths: Sequence[float],
    level: float,
    summary: dict[str, Figure],
    notes: list[str],
) -> Iterator[Row]:
    """A row for each method where it preserves a share, and for its difference to the tested one."""
    share = f"{level:.1%} preserved"
    found = at_equal_preservation(records, methods=methods, directions=directions, strengths=strengths, level=level)
    for name, cells in found.items():
        yield Row(f"{name} at {share}", cells)
        for side, cell in cells.items():
            assert cell.value is not None
            kind: Kind = "share" if name in methods else "difference"
            summary[f"{name.replace(' ', '_')}_{side}_at_equal_preservation"] = Figure(cell.value, kind)
    notes += [f"no strength of {method} has {share}" for method in methods if method not in found]


def _transfer_rows(
    records: Sequence[Record],
    groups: Sequence[str],
    directions: Sequence[str],
    tested: str,
    summary: dict[str, Figure],
) -> Iterator[Row]:
    """A row for each group of images; the mean over directions and sides goes to the summary."""
    measured = {record.item for record in records if record.measure == "transfer"}
    sides = [_success(side, "transfer", tested, side=side) for side in _SIDES]
    parts = [
        _success(f"{side} {direction}", "transfer", tested, side=side, label=direction)
        for direction in directions
        for side in _SIDES
    ]
    for group in groups:
        if group in measured:
            pivot = Pivot(records, [group], [*sides, *parts])
            mean = pivot.mean_share(column.name for column in parts)
            summary[f"transfer_{group.replace(' ', '_')}"] = Figure(mean, "share")
            yield from pivot.rows(_SIDES)


def _combination_rows(
    records: Sequence[Record], combinations: Sequence[Sequence[str]], tested: str, summary: dict[str, Figure]
) -> Iterator[Row]:
    """A row for each combination, whose share of complete successes stands in the first column."""
    for number, parts in enumerate(combinations, start=1):
        complete = _success("add", "all parts", tested)
        columns = [_success(part, "part", tested, label=part) for part in parts]
        name = " + ".join(parts)
        whole, each = Pivot(records, [name], [complete]), Pivot(records, [name], columns)
        summary[f"combination_{number}_all"] = whole.figure("add")
        summary[f"combination_{number}_each"] = Figure(each.mean_share(parts), "share")
        yield from whole.rows()
