import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from tokenlearn.callbacks import EmbeddingExport, ReportWriter, report_writer
from tokenlearn.callbacks.report_writer import write_summary
from tokenlearn.metrics import Report


def report():
    return Report(
        title="judged by the judge",
        columns=["class", "name", "name_low", "name_high", "name_images", "token", "token_low", "token_high"],
        rows=[["wizard", 0.25, 0.1, 0.5, 32, 0.875, 0.75, 0.95], ["pirate", None, None, None, 0, 0.5, 0.25, 0.75]],
        bars=["name", "token"],
        summary={"mean_accuracy_name": 0.25, "mean_accuracy_token": 0.6875},
        fit_summary={"judged_accuracy_before": 0.25, "judged_accuracy_after": 0.6875},
        pictures={"before_after": [("wizard", torch.rand(2, 3, 8, 8))], "empty": []},
    )


def run(folder, *callbacks):
    return SimpleNamespace(default_root_dir=str(folder), callbacks=list(callbacks))


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is drawn."""
    drawn = []

    class Recorded(Figure):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            drawn.append(self)

    monkeypatch.setattr(report_writer, "Figure", Recorded)
    return drawn


def test_test_leaves_table_figure_pictures_and_summary(tmp_path, figures, capsys):
    ReportWriter().on_test_end(run(tmp_path), SimpleNamespace(report=report()))
    assert {path.name for path in tmp_path.iterdir()} == {"table.csv", "table.png", "before_after.png", "summary.json"}

    with (tmp_path / "table.csv").open(newline="") as file:
        header, wizard, pirate = csv.reader(file)
    assert header == report().columns
    assert wizard == ["wizard", "0.2500", "0.1000", "0.5000", "32", "0.8750", "0.7500", "0.9500"]
    assert pirate == ["pirate", "", "", "", "0", "0.5000", "0.2500", "0.7500"]

    assert json.loads((tmp_path / "summary.json").read_text()) == report().summary

    (axes,) = figures[0].axes
    assert [bar.get_height() for bar in axes.patches] == [0.25, 0.875, 0.5]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["wizard", "pirate"]
    ends = [
        [(float(low), float(high)) for (_, low), (_, high) in bars.errorbar.lines[2][0].get_segments()]
        for bars in axes.containers
        if bars.__class__.__name__ == "BarContainer"
    ]
    assert ends == [[pytest.approx((0.1, 0.5))], [pytest.approx((0.75, 0.95)), pytest.approx((0.25, 0.75))]]
    with Image.open(tmp_path / "table.png") as picture:
        picture.load()

    out = capsys.readouterr().out
    assert "25.0% [10%, 50%]" in out
    assert "87.5% [75%, 95%]" in out
    assert next(line for line in out.splitlines() if line.startswith("pirate")).split()[1] == "-"


def test_plain_columns_and_curves(tmp_path, figures, capsys):
    made = Report(
        title="edits",
        columns=["direction", "add", "add_low", "add_high", "kept", "psnr"],
        rows=[["smile", 0.5, 0.25, 0.75, 0.925, 21.25], ["sketch", 0.5, 0.25, 0.75, None, None]],
        bars=["add"],
        summary={"add_success": 0.5, "rank_correlation": 0.875},
        plain=["kept", "psnr"],
        curves={"caso": [(0.9, 0.5), (0.8, 1.0)]},
    )
    ReportWriter().on_test_end(run(tmp_path), SimpleNamespace(report=made))
    lines = capsys.readouterr().out.splitlines()
    smile, sketch = (next(line for line in lines if line.startswith(name)) for name in ("smile", "sketch"))
    assert smile.split()[-2:] == ["92.5%", "21.2"]
    assert sketch.split()[-2:] == ["-", "-"]
    assert "add_success 50.0%" in lines
    assert "rank_correlation 0.875" in lines
    _, curves = figures[0].axes
    (line,) = curves.lines
    assert line.get_xydata().tolist() == [[0.9, 0.5], [0.8, 1.0]]


def test_many_rows_are_panels_below_each_other(tmp_path, figures):
    rows = [[f"class {number}", 0.5, 0.25, 0.75] for number in range(20)]
    columns, curves = ["class", "add", "add_low", "add_high"], {"caso": [(0.9, 0.5)]}
    made = Report(title="edits", columns=columns, rows=rows, bars=["add"], summary={}, curves=curves)
    ReportWriter().on_test_end(run(tmp_path), SimpleNamespace(report=made))
    first, beside, second = figures[0].axes
    names = [label.get_text() for axes in (first, second) for label in axes.get_xticklabels()]
    assert names == [row[0] for row in rows]
    assert [len(axes.patches) for axes in (first, second)] == [18, 2]
    assert first.get_xlim() == second.get_xlim()
    assert beside.get_xlabel() == "untouched attributes kept"


def test_after_a_fit_it_says_what_the_fit_left(tmp_path, capsys):
    export = EmbeddingExport()
    export.paths = [tmp_path / "embeddings" / "wizard.safetensors"]
    writer = ReportWriter()
    trainer = run(tmp_path, export, writer)
    writer.on_fit_start(trainer, SimpleNamespace())
    writer.on_fit_end(trainer, SimpleNamespace())
    writer.on_test_end(trainer, SimpleNamespace(report=report()))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.pop("minutes") >= 0
    assert summary == report().summary | report().fit_summary | {"embeddings": [str(export.paths[0])]}
    out = capsys.readouterr().out
    assert str(export.paths[0]) in out
    assert str(tmp_path / "before_after.png") in out
    assert "empty.png" not in out
    assert "68.8%" in out
    assert f"--logdir {tmp_path}" in out


def test_no_report_no_files(tmp_path):
    ReportWriter().on_test_end(run(tmp_path), SimpleNamespace(report=None))
    assert not list(tmp_path.iterdir())


def test_nothing_is_half_written(tmp_path, monkeypatch):
    write_summary(tmp_path, {"minutes": 1.0})
    with pytest.raises(TypeError):
        write_summary(tmp_path, {"minutes": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"minutes": 1.0}

    def full_disk(self, path, **options):
        Path(path).write_bytes(b"half a")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="disk full"):
        ReportWriter().on_test_end(run(tmp_path), SimpleNamespace(report=report()))
    assert {path.name for path in tmp_path.iterdir()} == {"table.csv", "summary.json"}
