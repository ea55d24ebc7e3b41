"""The table of a test, as text, CSV and picture, and ``summary.json``."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenlearn.callbacks.embedding_export import EmbeddingExport
from tokenlearn.callbacks.pictures import save_picture, sheet, to_image
from tokenlearn.files import atomic_write
from tokenlearn.metrics import Report, is_share

_PICTURE = "pictures/validation.png"
_ROWS_PER_PANEL = 18
_LABEL_WIDTH = 12  # characters


class ReportWriter(L.Callback):
    """Write what a test found to the run folder and print it; after a fit, also say what the fit left behind."""

    def __init__(self) -> None:
        self._fit_started: float | None = None
        self._minutes: float | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._fit_started = time.monotonic()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        if self._fit_started is not None:
            self._minutes = (time.monotonic() - self._fit_started) / 60

    @rank_zero_only
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write ``table.csv``, ``table.png``, the report's pictures and ``summary.json``."""
        report = getattr(pl_module, "report", None)
        if not isinstance(report, Report):
            return
        folder = Path(trainer.default_root_dir)
        _write_csv(report, folder / "table.csv")
        _draw(report, folder / "table.png")
        for name, rows in report.pictures.items():
            if rows:
                save_picture(
                    sheet([(caption, [to_image(image) for image in images]) for caption, images in rows]),
                    folder / f"{name}.png",
                )
        print(_as_text(report))
        summary: dict[str, Any] = dict(report.summary)
        if self._minutes is not None:
            pictures = [("before/after picture", f"{name}.png") for name, rows in report.pictures.items() if rows]
            summary |= self._what_fit_left(trainer, report.fit_summary, report.title, pictures)
        write_summary(folder, summary)

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After a fit, write ``summary.json`` with the validation figures of the tokens that were kept."""
        if self._minutes is None or trainer.state.fn != TrainerFn.VALIDATING:
            return
        figures = {
            name.removeprefix("val/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        folder = Path(trainer.default_root_dir)
        pictures = [("validation picture", _PICTURE)] if (folder / _PICTURE).is_file() else []
        write_summary(folder, self._what_fit_left(trainer, figures, "validation", pictures))

    def _what_fit_left(
        self, trainer: L.Trainer, figures: Mapping[str, float], source: str, pictures: Sequence[tuple[str, str]]
    ) -> dict[str, Any]:
        """Print figures, pictures and embedding files of a fit, and give what the summary has of them."""
        folder, minutes = Path(trainer.default_root_dir), self._minutes or 0.0
        paths = [
            str(path)
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, EmbeddingExport)
            for path in callback.paths
        ]
        for path in paths:
            print(f"embedding file        {path}")
        for caption, name in pictures:
            print(f"{caption:<21} {folder / name}")
        print(f"TensorBoard log       tensorboard --logdir {folder}")
        for name, value in figures.items():
            print(f"{name:<21} {_figure(name, value)}  ({source})")
        return {**figures, "minutes": round(minutes, 2), "embeddings": paths}


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write ``summary.json``: one flat object of numbers and paths."""
    with atomic_write(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")


def _cell(value: str | float | None) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _write_csv(report: Report, path: Path) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(report.columns)
        writer.writerows([_cell(value) for value in row] for row in report.rows)


def _as_text(report: Report) -> str:
    index = {column: position for position, column in enumerate(report.columns)}
    header = [report.columns[0], *report.bars, *report.plain]
    lines = [header]
    for row in report.rows:
        cells = [str(row[0])]
        for column in report.bars:
            value, low, high = (row[index[name]] for name in (column, f"{column}_low", f"{column}_high"))
            measured = isinstance(value, float) and isinstance(low, float) and isinstance(high, float)
            cells.append(f"{value:.1%} [{low:.0%}, {high:.0%}]" if measured else "-")
        for column in report.plain:
            value = row[index[column]]
            cells.append(_figure(column, value) if isinstance(value, float) else "-")
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    table = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    separator = "\n" if report.plain else "  "
    means = separator.join(
        f"{name} {_figure(report.kinds.get(name, name), value)}" for name, value in report.summary.items()
    )
    return f"\n{report.title}, with 95 % intervals\n{table}\n{means}\n"


def _figure(name: str, value: float) -> str:
    return f"{value:.1%}" if is_share(name) else f"{value:.3g}"


def _draw(report: Report, path: Path) -> None:
    """Bars of many rows are panels below each other; curves stand beside the first."""
    starts = range(0, max(1, len(report.rows)), _ROWS_PER_PANEL)
    panels = [report.rows[start : start + _ROWS_PER_PANEL] for start in starts]
    widths = [max(5.0, 0.9 * len(panels[0])), *([4.0] if report.curves else [])]
    figure = Figure(figsize=(sum(widths), 4.0 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), len(widths), width_ratios=widths, squeeze=False)
    for own, rows in zip(axes[:, 0], panels, strict=True):
        _draw_bars(report, rows, own)
        own.set_xlim(-0.6, len(panels[0]) - 0.4)
    axes[0, 0].set_title(report.title)
    axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    if report.curves:
        _draw_curves(report, axes[0, 1])
        for spare in axes[1:, 1]:
            spare.remove()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _draw_curves(report: Report, axes: Axes) -> None:
    for name, points in report.curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xlabel("untouched attributes kept")
    axes.set_ylabel("edits that succeed")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylim(0, 1.05)
    axes.set_title("at rising strength")
    axes.legend(loc="lower left")


def _draw_bars(report: Report, rows: Sequence[Sequence[str | float | None]], axes: Axes) -> None:
    index = {column: position for position, column in enumerate(report.columns)}
    width = 0.8 / max(1, len(report.bars))
    for offset, column in enumerate(report.bars):
        drawn = [
            (position + (offset + 0.5) * width - 0.4, row)
            for position, row in enumerate(rows)
            if row[index[column]] is not None
        ]
        heights = [float(row[index[column]] or 0) for _, row in drawn]
        low = [
            height - float(row[index[f"{column}_low"]] or 0) for height, (_, row) in zip(heights, drawn, strict=True)
        ]
        high = [
            float(row[index[f"{column}_high"]] or 0) - height for height, (_, row) in zip(heights, drawn, strict=True)
        ]
        axes.bar([place for place, _ in drawn], heights, width, yerr=(low, high), capsize=2, label=column)
    names = [fill(str(row[0]), _LABEL_WIDTH, break_long_words=False) for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize="x-small")
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
