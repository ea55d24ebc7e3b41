"""The table of optimised latents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from tokenlearn.evaluation.records import Record
from tokenlearn.evaluation.table import Cell, Column, Figure, Kind, Pivot, Table
from tokenlearn.losses.objective import Objective

_COSTS: dict[str, Kind] = {"loss": "loss", "seconds": "seconds", "evaluations": "count", "cost": "count"}
_SETTINGS: dict[str, Kind] = {"sampling_steps": "count", "guidance_scale": "score"}


def doodl_table(
    records: Sequence[Record],
    *,
    judges: Mapping[str, Objective],
    methods: Sequence[str],
    realism_distances: Mapping[tuple[str, str], float],
) -> Table:
    """The table of :class:`tokenlearn.evaluation.doodl.DoodlEvaluation`, without images.

    Args:
        records: all records.
        judges: row to a judge of its images.
        methods: compared methods.
        realism_distances: row and method to the distance from real images; empty for no such column. A distance of
            sets of images is not a record.
    """
    kinds: dict[str, Kind] = {judge.score_name: judge.score_kind for judge in judges.values()}
    measures: dict[str, Kind] = _COSTS | {name: kinds[name] for name in sorted(kinds) if kinds[name] != "share"}
    share = next((name for name, kind in kinds.items() if kind == "share"), "accuracy")
    columns: list[Column] = []
    for method in methods:
        columns.append(Column(name=method, kind="share", measure=share, method=method, interval=True, bar=True))
        columns += [
            Column(name=f"{method}_{measure}", kind=kind, measure=measure, method=method, interval=measure in kinds)
            for measure, kind in measures.items()
        ]
        if realism_distances:
            columns.append(Column(name=_realism(method), kind="distance", measure="realism_distance", method=method))
    everywhere = next((method for method in methods if method in ("none", "one_step", "doodl")), methods[0])
    columns += [Column(name=name, kind=kind, measure=name, method=everywhere) for name, kind in _SETTINGS.items()]
    rows = Pivot(records, list(judges), columns).rows()
    for place, row in enumerate(rows):
        distances = {
            _realism(method): Cell(distance, None, None, 0)
            for method in methods
            if not math.isnan(distance := realism_distances.get((row.name, method), math.nan))
        }
        rows[place] = row._replace(cells={**row.cells, **distances})
    return Table(
        title="optimised latents, each row by its judge",
        heading="guidance",
        columns=columns,
        rows=rows,
        summary=dict(_summary(records, judges, methods)),
    )


def _realism(method: str) -> str:
    return f"{method}_realism_distance"


def _summary(
    records: Sequence[Record], judges: Mapping[str, Objective], methods: Sequence[str]
) -> Iterator[tuple[str, Figure]]:
    """Mean score of each row and method that has images."""
    for row, judge in judges.items():
        columns = [
            Column(name=method, kind=judge.score_kind, measure=judge.score_name, method=method) for method in methods
        ]
        pivot = Pivot(records, [row], columns)
        for method in methods:
            if not math.isnan(mean := pivot.mean(method)):
                yield f"{row.replace(' ', '_')}_{method}", Figure(mean, judge.score_kind)
