import csv
import json
from pathlib import Path

import lightning as L
import pytest
import torch
from matplotlib import figure
from PIL import Image

from tokenlearn.callbacks import EmbeddingExport, ReportWriter
from tokenlearn.callbacks.report_writer import write_summary
from tokenlearn.errors import UserError
from tokenlearn.evaluation.records import Record
from tokenlearn.evaluation.table import Cell, Column, Figure, Row, Table


class Module(L.LightningModule):
    """A task that learns nothing, and an evaluation whose table is there already."""

    def __init__(self, table=None):
        super().__init__()
        self.table, self.weight = table, torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch):
        return self.weight

    def validation_step(self, batch):
        self.log("val/guided_accuracy", 0.25, batch_size=1)
        self.log("val/loss", 3.0, batch_size=1)

    def test_step(self, batch):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder, *callbacks):
    return L.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def evaluated(folder, table):
    trainer(folder, ReportWriter()).test(Module(table), [0], verbose=False)


def share(name, **options):
    return Column(name=name, kind="share", measure="success", interval=True, **options)


def plain(name, kind):
    return Column(name=name, kind=kind, measure=name)


def cell(value, low=None, high=None, images=0):
    return Cell(value, low, high, images)


def table():
    return Table(
        title="judged by the judge",
        heading="class",
        columns=[share("name", bar=True), share("token", bar=True)],
        rows=[
            Row("wizard", {"name": cell(0.25, 0.1, 0.5, 32), "token": cell(0.875, 0.75, 0.95, 32)}),
            Row("pirate", {"name": cell(None), "token": cell(0.5, 0.25, 0.75, 16)}),
        ],
        summary={"mean_accuracy_name": Figure(0.25, "share"), "mean_accuracy_token": Figure(0.6875, "share")},
        fit_summary={"judged_accuracy_after": Figure(0.6875, "share")},
        images={"before_after": [("wizard", list(torch.rand(2, 3, 8, 8)))], "empty": []},
        records=[Record("token", "wizard", "", "success", 7, 1.0)],
    )


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is plotted."""
    plotted = []

    class Recorded(figure.Figure):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            plotted.append(self)

    monkeypatch.setattr(figure, "Figure", Recorded)
    return plotted


def test_an_evaluation_leaves_table_records_figure_images_and_summary(tmp_path, figures, capsys):
    evaluated(tmp_path, table())
    files = {"table.csv", "records.csv", "table.png", "before_after.png", "summary.json"}
    assert {path.name for path in tmp_path.iterdir()} == files

    with (tmp_path / "table.csv").open(newline="") as file:
        header, wizard, pirate = csv.reader(file)
    names = [f"{name}{end}" for name in ("name", "token") for end in ("", "_low", "_high", "_images")]
    assert header == ["class", *names]
    assert wizard == ["wizard", "0.2500", "0.1000", "0.5000", "32", "0.8750", "0.7500", "0.9500", "32"]
    assert pirate == ["pirate", "", "", "", "0", "0.5000", "0.2500", "0.7500", "16"]
    with (tmp_path / "records.csv").open(newline="") as file:
        (record,) = csv.DictReader(file)
    assert (record["item"], record["seed"], record["value"]) == ("wizard", "7", "1")

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {"mean_accuracy_name": 0.25, "mean_accuracy_token": 0.6875}

    (axes,) = figures[0].axes
    assert [bar.get_height() for bar in axes.patches] == [0.25, 0.875, 0.5]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["wizard", "pirate"]
    ends = [
        [(float(low), float(high)) for (_, low), (_, high) in bars.errorbar.lines[2][0].get_segments()]
        for bars in axes.containers
        if bars.__class__.__name__ == "BarContainer"
    ]
    assert ends == [[pytest.approx((0.1, 0.5))], [pytest.approx((0.75, 0.95)), pytest.approx((0.25, 0.75))]]
    with Image.open(tmp_path / "table.png") as image:
        image.load()

    out = capsys.readouterr().out
    assert "25.0% [10%, 50%]" in out
    assert "87.5% [75%, 95%]" in out
    assert next(line for line in out.splitlines() if line.startswith("pirate")).split()[1] == "-"


def test_columns_of_all_kinds_and_curves(tmp_path, figures, capsys):
    made = Table(
        title="edits",
        heading="direction",
        columns=[share("add", bar=True), plain("kept", "share"), plain("psnr", "decibels"), plain("cost", "count")],
        rows=[
            Row(
                "smile",
                {"add": cell(0.5, 0.25, 0.75, 8), "kept": cell(0.925), "psnr": cell(21.25), "cost": cell(1440)},
            ),
            Row("sketch", {"add": cell(0.5, 0.25, 0.75, 8)}),
        ],
        summary={"add_success": Figure(0.5, "share"), "rank_correlation": Figure(0.875, "correlation")},
        curves={"caso": [(0.9, 0.5), (0.8, 1.0)]},
    )
    evaluated(tmp_path, made)
    lines = capsys.readouterr().out.splitlines()
    smile, sketch = (next(line for line in lines if line.startswith(name)) for name in ("smile", "sketch"))
    assert smile.split()[-3:] == ["92.5%", "21.2", "1440"]
    assert sketch.split()[-3:] == ["-", "-", "-"]
    assert "add_success 50.0%" in lines
    assert "rank_correlation 0.875" in lines
    with (tmp_path / "table.csv").open(newline="") as file:
        assert list(csv.reader(file))[2] == ["sketch", "0.5000", "0.2500", "0.7500", "8", "", "", ""]
    _, curves = figures[0].axes
    (line,) = curves.lines
    assert line.get_xydata().tolist() == [[0.9, 0.5], [0.8, 1.0]]


def test_many_rows_are_panels_below_each_other(tmp_path, figures):
    rows = [Row(f"class {number}", {"add": cell(0.5, 0.25, 0.75)}) for number in range(20)]
    evaluated(
        tmp_path,
        Table(
            title="edits",
            heading="class",
            columns=[share("add", bar=True)],
            rows=rows,
            summary={},
            curves={"caso": [(0.9, 0.5)]},
        ),
    )
    first, beside, second = figures[0].axes
    names = [label.get_text() for axes in (first, second) for label in axes.get_xticklabels()]
    assert names == [row.name for row in rows]
    assert [len(axes.patches) for axes in (first, second)] == [18, 2]
    assert first.get_xlim() == second.get_xlim()
    assert beside.get_xlabel()


def test_after_a_fit_it_lists_what_the_fit_left(tmp_path, capsys):
    export, module = EmbeddingExport(), Module(table())
    run = trainer(tmp_path, export, ReportWriter())
    run.fit(module, [0])
    export.paths = [tmp_path / "embeddings" / "wizard.safetensors"]
    run.test(module, [0], verbose=False)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.pop("minutes") >= 0
    assert summary == {
        "mean_accuracy_name": 0.25,
        "mean_accuracy_token": 0.6875,
        "judged_accuracy_after": 0.6875,
        "embeddings": [str(export.paths[0])],
    }
    out = capsys.readouterr().out
    assert str(export.paths[0]) in out
    assert str(tmp_path / "before_after.png") in out
    assert "empty.png" not in out
    assert "68.8%" in out
    assert "--logdir" not in out  # there is no logger


def test_after_a_fit_without_evaluation_the_validation_is_the_summary(tmp_path):
    run, module = trainer(tmp_path, ReportWriter()), Module()
    run.fit(module, [0], [0])
    run.validate(module, [0], verbose=False)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["guided_accuracy"], summary["loss"], summary["embeddings"]) == (0.25, 3.0, [])


def test_no_table_no_files(tmp_path):
    evaluated(tmp_path, None)
    assert not list(tmp_path.iterdir())


def test_nothing_is_half_written(tmp_path, monkeypatch):
    write_summary(tmp_path, {"minutes": 1.0})
    with pytest.raises(TypeError):
        write_summary(tmp_path, {"minutes": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"minutes": 1.0}

    def full_disk(self, path, **options):
        Path(path).write_bytes(b"half a")
        raise OSError("disk full")

    monkeypatch.setattr(figure.Figure, "savefig", full_disk)
    with pytest.raises(UserError, match="disk full"):
        evaluated(tmp_path, table())
    assert {path.name for path in tmp_path.iterdir()} == {"table.csv", "records.csv", "summary.json"}
