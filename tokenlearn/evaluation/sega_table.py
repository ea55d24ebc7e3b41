"""The table of semantic guidance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tokenlearn.evaluation.records import Record
from tokenlearn.evaluation.sega_methods import METHODS, PLAIN, SAFE, SEMANTIC, VARIANT, variant_item
from tokenlearn.evaluation.sega_settings import Arithmetic, Styles, Suppression
from tokenlearn.evaluation.table import Column, Figure, Pivot, Row, Table

_SIDES = ("add", "remove")
REALISM = "realism_distance"
_RANKS = ("rank_correlation", "both_sides_rank_correlation")


def sega_table(
    records: Sequence[Record],
    *,
    title: str,
    attributes: Sequence[str],
    combinations: Mapping[str, Sequence[str]],
    styles: Styles,
    arithmetic: Arithmetic | None,
    suppression: Suppression | None,
    variants: Sequence[str] = (),
) -> Table:
    """The table of :class:`tokenlearn.evaluation.sega.SegaEvaluation`.

    Args:
        records: all records.
        title: title of the table.
        attributes: rows of the attributes.
        combinations: name of each combination to its parts; rows of how many parts and which of them succeed.
        styles: rows of further prompts.
        arithmetic: rows of images with and without the sum of concepts.
        suppression: rows of images with and without the unwanted concept.
        variants: names of variants of semantic guidance; a row each, over all attributes.
    """
    measured = {record.method for record in records if record.measure == "success"}
    methods = [method for method in METHODS if method in measured]
    columns = [column for method in methods for column in _columns(method)]
    columns += [Column(name=rank, kind="correlation", measure=rank, method=SEMANTIC) for rank in _RANKS]
    kept = [
        Column(name=f"{_prefix(method)}{side}_untouched_kept", kind="share", measure="kept", method=method, side=side)
        for method in methods
        for side in _SIDES
    ]
    distances = [
        Column(name=f"{_prefix(method)}{REALISM}", kind="distance", measure=REALISM, method=method)
        for method in methods
        if any(record.measure == REALISM for record in records)
    ]
    seconds = [
        Column(name=_seconds(method), kind="seconds", measure="seconds", method=method) for method in (PLAIN, *methods)
    ]
    by_attribute, over_all = Pivot(records, attributes, [*columns, *kept, *distances]), Pivot(records, [""], seconds)

    summary: dict[str, Figure] = {}
    for method in methods:
        for side in _SIDES:
            name = f"{_prefix(method)}{side}"
            summary[f"{name}_success"] = by_attribute.figure(name)
            summary[f"{name}_untouched_kept"] = by_attribute.figure(f"{name}_untouched_kept")
        summary[f"{_prefix(method)}untouched_kept"] = by_attribute.figure(f"{_prefix(method)}untouched_kept")
        summary[_seconds(method)] = over_all.figure(_seconds(method))
    summary[_seconds(PLAIN)] = over_all.figure(_seconds(PLAIN))
    summary |= {rank: by_attribute.figure(rank) for rank in _RANKS}
    if distances:
        summary |= {column.name: by_attribute.figure(column.name) for column in distances}
        plain = Column(name=f"{_prefix(PLAIN)}{REALISM}", kind="distance", measure=REALISM, method=PLAIN)
        summary[plain.name] = Pivot(records, [""], [plain]).figure(plain.name)
        columns += distances

    rows = by_attribute.rows(column.name for column in columns)
    rows += _combinations(records, combinations, summary)
    rows += _styles(records, styles, summary)
    rows += _variants(records, variants, summary)
    if arithmetic is not None:
        ways = {"arithmetic_plain": (PLAIN, "plain"), "arithmetic": (SEMANTIC, arithmetic.concept)}
        rows += _ways(records, "arithmetic", arithmetic.label, ways, summary, name=arithmetic.label)
    if suppression is not None:
        ways = {
            "suppression_plain": (PLAIN, "plain"),
            "suppression": (SEMANTIC, SEMANTIC),
            "suppression_safe": (SAFE, SAFE),
        }
        label = suppression.label
        rows += _ways(records, "suppression", label, ways, summary, name=f"{label} shown")
    return Table(title=title, heading="attribute", columns=columns, rows=rows, summary=summary)


def _prefix(method: str) -> str:
    return "" if method == SEMANTIC else f"{method.replace(' ', '_')}_"


def _seconds(method: str) -> str:
    return f"{_prefix(method)}seconds"


def _columns(method: str) -> Iterator[Column]:
    """Success of both sides, and untouched attributes, by a method."""
    prefix = _prefix(method)
    for side in _SIDES:
        yield _share(f"{prefix}{side}", "success", method, side=side, bar=method == SEMANTIC)
    yield Column(name=f"{prefix}untouched_kept", kind="share", measure="kept", method=method)


def _share(
    name: str, measure: str, method: str, *, side: str | None = None, label: str | None = None, bar: bool = False
) -> Column:
    return Column(
        name=name, kind="share", measure=measure, method=method, side=side, label=label, interval=True, bar=bar
    )


def _row(records: Sequence[Record], name: str, item: str, column: Column) -> Row:
    """A row of one cell, in a column of that name."""
    return Pivot(records, [item], [column]).rows()[0]._replace(name=name)


def _combinations(
    records: Sequence[Record], combinations: Mapping[str, Sequence[str]], summary: dict[str, Figure]
) -> Iterator[Row]:
    for number, (name, parts) in enumerate(combinations.items(), start=1):
        counts = [f"at least {index + 1}" for index in range(len(parts))]
        for label in (*counts, *parts):
            yield _row(records, f"{name}: {label}", name, _share("add", "parts", SEMANTIC, label=label))
        everything = _share("all", "parts", SEMANTIC, label=counts[-1])
        summary[f"combination_{number}_all"] = Pivot(records, [name], [everything]).figure("all")


def _styles(records: Sequence[Record], styles: Styles, summary: dict[str, Figure]) -> list[Row]:
    columns = [
        _share("add", "success", SEMANTIC),
        Column(name="untouched_kept", kind="share", measure="kept", method=SEMANTIC),
    ]
    pivot = Pivot(records, styles.prompts, columns)
    if styles.prompts and styles.seeds:
        summary["styles_add_success"] = pivot.figure("add")
        summary["styles_untouched_kept"] = pivot.figure("untouched_kept")
    return pivot.rows(["add"])


def _variants(records: Sequence[Record], names: Sequence[str], summary: dict[str, Figure]) -> list[Row]:
    columns = [_share(side, "success", VARIANT, side=side) for side in _SIDES]
    columns.append(Column(name="untouched_kept", kind="share", measure="kept", method=VARIANT))
    pivot = Pivot(records, [variant_item(name) for name in names], columns)
    rows = pivot.rows()
    for name, row in zip(names, rows, strict=True):
        for column in columns:
            if (value := row.cells[column.name].value) is not None:
                summary[f"variant_{name.replace(' ', '_')}_{column.name}"] = Figure(value, "share")
    return rows


def _ways(
    records: Sequence[Record],
    measure: str,
    item: str,
    ways: Mapping[str, tuple[str, str]],
    summary: dict[str, Figure],
    *,
    name: str,
) -> Iterator[Row]:
    """A row for each of several methods, given as a key of the summary to the method and its caption."""
    for key, (method, caption) in ways.items():
        column = _share("add", measure, method)
        summary[key] = Pivot(records, [item], [column]).figure("add")
        yield _row(records, f"{name}: {caption}", item, column)
