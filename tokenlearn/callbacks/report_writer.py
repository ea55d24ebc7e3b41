"""The table of an evaluation as text, CSV and figure, its records, and ``summary.json``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from tokenlearn.callbacks.embedding_export import EmbeddingExport
from tokenlearn.callbacks.image_grid import FINAL_SHEET
from tokenlearn.callbacks.images import save_image, sheet, to_image
from tokenlearn.callbacks.learning_curve import validation_figures
from tokenlearn.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tokenlearn.evaluation.table import Column, Figure, Row, Table

_ROWS_PER_PANEL = 18
_LABEL_WIDTH = 12  # characters


class ReportWriter(L.Callback):
    """Write an evaluation's table to the run folder and print it; after a fit, list the fit's files too.

    Attributes:
        settings: hash of the run's settings, which each row of the tables has; None for none.
    """

    def __init__(self) -> None:
        self.settings: str | None = None
        self._fit_started: float | None = None
        self._has_fitted = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._fit_started = time.monotonic()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember that an evaluation to come is of this fit."""
        self._has_fitted = self._fit_started is not None

    @rank_zero_only
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write ``table.csv``, ``table.png``, ``records.csv``, the table's images and ``summary.json``."""
        table: Table | None = getattr(pl_module, "table", None)
        if table is None:
            return
        folder = Path(trainer.default_root_dir)
        table.write(folder, self.settings)
        _plot(table, folder / "table.png")
        for name, rows in table.images.items():
            if rows:
                save_image(
                    sheet([(caption, [to_image(image) for image in images]) for caption, images in rows]),
                    folder / f"{name}.png",
                )
        print(f"\n{table}\n")
        summary: dict[str, Any] = _values(table.summary)
        if self._has_fitted:
            sheets = [("before/after images", f"{name}.png") for name, rows in table.images.items() if rows]
            printed = {name: str(figure) for name, figure in table.fit_summary.items()}
            summary |= _values(table.fit_summary) | self._results_of_fit(trainer, printed, table.title, sheets)
        write_summary(folder, summary)

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After a fit, write ``summary.json`` with the validation figures of the final tokens."""
        if not self._has_fitted or trainer.state.fn != TrainerFn.VALIDATING:
            return
        figures = validation_figures(trainer)
        folder = Path(trainer.default_root_dir)
        sheets = [("validation images", FINAL_SHEET)] if (folder / FINAL_SHEET).is_file() else []
        printed = {name: f"{value:.3g}" for name, value in figures.items()}
        write_summary(folder, figures | self._results_of_fit(trainer, printed, "validation", sheets))

    def _results_of_fit(
        self, trainer: L.Trainer, figures: Mapping[str, str], source: str, sheets: Sequence[tuple[str, str]]
    ) -> dict[str, Any]:
        """Print embedding files, images and figures of a fit; returns files and minutes, with the evaluation's."""
        folder, minutes = Path(trainer.default_root_dir), (time.monotonic() - (self._fit_started or 0)) / 60
        exports = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, EmbeddingExport)
        ]
        paths = [str(path) for export in exports for path in export.paths]
        for path in paths:
            print(f"embedding file        {path}")
        for line in (line for export in exports for line in export.usage):
            print(f"what to type          {line}")
        for caption, name in sheets:
            print(f"{caption:<21} {folder / name}")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                print(f"TensorBoard log       tensorboard --logdir {logger.log_dir}")
        for name, figure in figures.items():
            print(f"{name:<21} {figure}  ({source})")
        print(f"minutes               {minutes:.1f}")
        return {"minutes": round(minutes, 2), "embeddings": paths}


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write ``summary.json``: one flat object of numbers and paths."""
    with atomic_write(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")


def _values(figures: Mapping[str, Figure]) -> dict[str, float]:
    return {name: figure.value for name, figure in figures.items()}


def _plot(table: Table, path: Path) -> None:
    """Bars of many rows are panels below each other; curves stand beside the first."""
    from matplotlib.figure import Figure as Canvas

    starts = range(0, max(1, len(table.rows)), _ROWS_PER_PANEL)
    panels = [table.rows[start : start + _ROWS_PER_PANEL] for start in starts]
    widths = [max(5.0, 0.9 * len(panels[0])), *([4.0] if table.curves else [])]
    canvas = Canvas(figsize=(sum(widths), 4.0 * len(panels)), layout="constrained")
    axes = canvas.subplots(len(panels), len(widths), width_ratios=widths, squeeze=False)
    bars = [column for column in table.columns if column.bar]
    for panel, rows in zip(axes[:, 0], panels, strict=True):
        _plot_bars(bars, rows, panel)
        panel.set_xlim(-0.6, len(panels[0]) - 0.4)
    axes[0, 0].set_title(table.title)
    axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    if table.curves:
        _plot_curves(table, axes[0, 1])
        for spare in axes[1:, 1]:
            spare.remove()
    with atomic_write(path) as temporary:
        canvas.savefig(temporary, format="png", dpi=110)


def _plot_curves(table: Table, axes: Axes) -> None:
    for name, points in table.curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xlabel("untouched attributes preserved")
    axes.set_ylabel("edits that succeed")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylim(0, 1.05)
    axes.set_title("at rising strength")
    axes.legend(loc="lower left")


def _plot_bars(columns: Sequence[Column], rows: Sequence[Row], axes: Axes) -> None:
    width = 0.8 / max(1, len(columns))
    for offset, column in enumerate(columns):
        cells = [
            (place + (offset + 0.5) * width - 0.4, cell.value, cell.low, cell.high)
            for place, row in enumerate(rows)
            if (cell := row.cells.get(column.name)) is not None
        ]
        measured = [
            (place, value, value - low, high - value)
            for place, value, low, high in cells
            if value is not None and low is not None and high is not None
        ]
        places, heights, below, above = zip(*measured, strict=True) if measured else ((), (), (), ())
        axes.bar(list(places), list(heights), width, yerr=(list(below), list(above)), capsize=2, label=column.name)
    names = [fill(row.name, _LABEL_WIDTH, break_long_words=False) for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize="x-small")
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
