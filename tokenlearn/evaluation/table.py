"""Tables: columns of a stated kind, and the one pivot that fills them from long records."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from tokenlearn.evaluation.records import Record, write_records
from tokenlearn.files import atomic_write
from tokenlearn.metrics.class_accuracy import wilson_interval
from tokenlearn.metrics.intervals import bootstrap_interval

if TYPE_CHECKING:
    from pathlib import Path

Kind = Literal[
    "share", "difference", "score", "distance", "similarity", "correlation", "decibels", "seconds", "count", "loss"
]
"""What a figure is, which decides how it is computed from records and printed."""


@dataclass(frozen=True)
class Figure:
    """A number with its kind; ``str()`` gives it as people read it.

    Attributes:
        value: shares in [0, 1], and differences of shares.
        kind: shares and differences are printed per cent.
    """

    value: float
    kind: Kind

    def __str__(self) -> str:
        if self.kind == "share":
            return f"{self.value:.1%}"
        if self.kind == "difference":
            return f"{self.value:+.1%}"
        return f"{self.value:.6g}" if self.kind == "count" else f"{self.value:.3g}"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table and the records that it is made of.

    Attributes:
        name: name in the header.
        kind: a ``share`` counts records of 1 among all; other kinds are means of the sides' means.
        measure: measure of the records.
        method: method of the records.
        side: side of the records; None for all.
        strength: strength of the records.
        label: label of the records; None for all.
        interval: whether a figure comes with its 95 % interval, of a mean by the bootstrap, and the number of images.
        bar: whether the figure of the table shows the share.
        printed: whether the printed table has the column.
    """

    name: str
    kind: Kind
    measure: str
    method: str = ""
    side: str | None = None
    strength: float | None = None
    label: str | None = None
    interval: bool = False
    bar: bool = False
    printed: bool = True

    @property
    def header(self) -> list[str]:
        """Names in the CSV file."""
        return [self.name, f"{self.name}_low", f"{self.name}_high", f"{self.name}_images"][: 4 if self.interval else 1]

    def entries(self, cell: Cell | None) -> list[str]:
        """Entries of the CSV file below :attr:`header`; blank without a cell."""
        if cell is None:
            return [""] * len(self.header)
        numbers = ["" if number is None else f"{number:.4f}" for number in (cell.value, cell.low, cell.high)]
        return [*numbers, str(cell.images)] if self.interval else numbers[:1]

    def text(self, cell: Cell | None) -> str:
        """Entry of the printed table."""
        if cell is None or cell.value is None:
            return "-"
        figure = Figure(cell.value, self.kind)
        if cell.low is None or cell.high is None or not (self.bar or self.kind == "difference"):
            return str(figure)
        if self.kind in ("share", "difference"):
            sign = "+" if self.kind == "difference" else ""
            return f"{figure} [{cell.low:{sign}.0%}, {cell.high:{sign}.0%}]"
        return f"{figure} [{Figure(cell.low, self.kind)}, {Figure(cell.high, self.kind)}]"


class Cell(NamedTuple):
    """An entry of a table.

    Attributes:
        value: None where nothing was measured.
        low: lower end of the 95 % interval.
        high: upper end.
        images: number of measurements.
    """

    value: float | None
    low: float | None
    high: float | None
    images: int


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        name: first cell.
        cells: by name of the column; a row may lack cells, which are left blank.
    """

    name: str
    cells: Mapping[str, Cell]


@dataclass(kw_only=True)
class Table:
    """What an evaluation found.

    Attributes:
        title: subject and judge.
        heading: name of the first column, which holds the rows' names.
        columns: the other columns.
        rows: one per class, attribute or objective.
        summary: figures for ``summary.json``.
        fit_summary: further figures after a fit.
        curves: name to (untouched, success) points at rising strength, shares in [0, 1].
        notes: lines to print below the table, such as settings that its figures depend on.
        images: file stem to rows of images, each a caption and images (3, H, W) in [0, 1].
        records: the measurements that the table is made of.
    """

    title: str
    heading: str
    columns: list[Column]
    rows: list[Row]
    summary: dict[str, Figure]
    fit_summary: dict[str, Figure] = field(default_factory=dict)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    images: dict[str, list[tuple[str, list[Tensor]]]] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def __str__(self) -> str:
        """The printed table, with the summary below it."""
        columns = [column for column in self.columns if column.printed]
        lines = [[self.heading, *(column.name for column in columns)]]
        lines += [[row.name, *(column.text(row.cells.get(column.name)) for column in columns)] for row in self.rows]
        widths = [max(map(len, entries)) for entries in zip(*lines, strict=True)]
        aligned = ["  ".join(entry.ljust(width) for entry, width in zip(line, widths, strict=True)) for line in lines]
        is_short = all(column.bar for column in columns) and len(self.summary) <= len(columns)
        separator = "  " if is_short else "\n"
        summary = separator.join(f"{name} {figure}" for name, figure in self.summary.items())
        return "\n".join([f"{self.title}, with 95 % intervals", *aligned, *self.notes, summary])

    def write(self, folder: Path, settings: str | None = None) -> None:
        """Write ``table.csv`` and ``records.csv`` to a folder, each whole or not at all.

        Args:
            folder: the folder.
            settings: hash of the run's settings for a last column of both; None for no such column.
        """
        last = [] if settings is None else [settings]
        with atomic_write(folder / "table.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            names = [name for column in self.columns for name in column.header]
            writer.writerow([self.heading, *names, *(["settings"] if last else [])])
            for row in self.rows:
                entries = (column.entries(row.cells.get(column.name)) for column in self.columns)
                writer.writerow([row.name, *itertools.chain.from_iterable(entries), *last])
        write_records(self.records, folder / "records.csv", settings)


class _Groups(NamedTuple):
    """Records of a column by item and side: (items, sides) float32 sums, numbers and means; and all values."""

    sums: Tensor
    totals: Tensor
    means: Tensor
    values: list[list[Tensor]]

    def counts(self) -> Tensor:
        """Sum and number (items, 2) over all sides."""
        return torch.stack([self.sums.sum(dim=1), self.totals.sum(dim=1)], dim=1).double()


class Pivot:
    """Records by the items of a table's rows and by its columns.

    Values that are not finite do not count. A share is the mean of all records of a cell. Every other kind is the mean
    of the means of both sides, so that a side with many images counts as much as one with few.

    Args:
        records: long records; means add up in their order.
        items: items of the rows, in order.
        columns: columns, each with the records that it is made of.
    """

    def __init__(self, records: Iterable[Record], items: Sequence[str], columns: Sequence[Column]) -> None:
        self.items = list(items)
        self.columns = {column.name: column for column in columns}
        by_measure: dict[tuple[str, str], list[Record]] = {}
        for record in records:
            by_measure.setdefault((record.measure, record.method), []).append(record)
        self._groups = {
            column.name: _grouped(by_measure.get((column.measure, column.method), []), self.items, column)
            for column in columns
        }

    def rows(self, columns: Iterable[str] | None = None) -> list[Row]:
        """A row per item with cells for the named columns, or for all."""
        names = list(self.columns) if columns is None else list(columns)
        return [Row(item, {name: self.cell(item, name) for name in names}) for item in self.items]

    def cell(self, item: str, column: str) -> Cell:
        """The entry of an item in a column."""
        place, groups = self.items.index(item), self._groups[column]
        correct, images = (round(number) for number in groups.counts()[place].tolist())
        if self.columns[column].kind == "share" and images:
            return Cell(correct / images, *wilson_interval(correct, images), images)
        value = float(groups.means[place].nanmean())
        if math.isnan(value):
            return Cell(None, None, None, images)
        if not self.columns[column].interval:
            return Cell(value, None, None, images)
        return Cell(value, *bootstrap_interval([part for part in groups.values[place] if len(part)]), images)

    def figure(self, column: str) -> Figure:
        """Mean of a column; of shares over its items, else over its items' sides. NaN without any."""
        kind = self.columns[column].kind
        return Figure(self.mean_share([column]) if kind == "share" else self.mean(column), kind)

    def mean(self, column: str) -> float:
        """Mean over the sides of all items, NaN without any."""
        return float(self._groups[column].means.nanmean())

    def mean_share(self, columns: Iterable[str]) -> float:
        """Mean share over the items of several columns, NaN without any."""
        counts = torch.stack([self._groups[column].counts() for column in columns], dim=1).flatten(0, 1)
        counted = counts[counts[:, 1] > 0]
        return float((counted[:, 0] / counted[:, 1]).mean())


def _grouped(records: Sequence[Record], items: Sequence[str], column: Column) -> _Groups:
    """Sums, numbers and means of a column's records by item and side."""
    rows = {item: index for index, item in enumerate(items)}
    sides = _numbered(sorted({record.side for record in records}) if column.side is None else [column.side])
    # An axis of all strengths, although one is wanted: then means of means add up in the same order at any of them.
    strengths = _numbered([*(record.strength for record in records), column.strength])
    counted = [
        record
        for record in records
        if record.item in rows
        and record.side in sides
        and column.label in (None, record.label)
        and math.isfinite(record.value)
    ]
    place = (
        torch.tensor([rows[record.item] for record in counted], dtype=torch.long),
        torch.tensor([sides[record.side] for record in counted], dtype=torch.long),
        torch.tensor([strengths[record.strength] for record in counted], dtype=torch.long),
    )
    values = torch.tensor([record.value for record in counted], dtype=torch.float32)
    empty = torch.zeros(len(rows), max(1, len(sides)), len(strengths))
    sums = empty.index_put(place, values, accumulate=True)
    totals = empty.index_put(place, torch.ones_like(values), accumulate=True)
    strength = strengths[column.strength]
    item_of, side_of, strength_of = place
    of_strength = strength_of == strength
    apart = [
        [values[of_strength & (item_of == item) & (side_of == side)] for side in range(max(1, len(sides)))]
        for item in range(len(rows) if column.interval and column.kind != "share" else 0)
    ]
    sums, totals, means = (part[..., strength] for part in (sums, totals, sums / totals))
    return _Groups(sums, totals, means, apart)


T = TypeVar("T")


def _numbered(values: Iterable[T]) -> dict[T, int]:
    """Different values, numbered in the order in which they come."""
    return {value: index for index, value in enumerate(dict.fromkeys(values))}
