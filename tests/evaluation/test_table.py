import math

import pytest
import torch

from tokenlearn.evaluation.records import Record
from tokenlearn.evaluation.table import Cell, Column, Figure, Pivot
from tokenlearn.metrics import bootstrap_interval, wilson_interval


def record(item, side, value, *, method="ours", measure="success", strength=None, label="", seed=0):
    return Record(method, item, side, measure, seed, value, strength, label)


def column(name, kind="share", measure="success", **options):
    return Column(name=name, kind=kind, measure=measure, **({"method": "ours"} | options))


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Figure(0.925, "share"), "92.5%"),
        (Figure(0.875, "correlation"), "0.875"),
        (Figure(21.25, "decibels"), "21.2"),
        (Figure(12.3, "distance"), "12.3"),
        (Figure(1440, "count"), "1440"),
        (Figure(-0.125, "difference"), "-12.5%"),
    ],
)
def test_the_kind_says_how_a_figure_is_printed(figure, text):
    assert str(figure) == text


def test_shares_have_an_interval_and_count_their_images():
    records = [record("smile", "add", value) for value in (1, 0, 1, 1)] + [record("hat", "remove", 0)]
    pivot = Pivot(records, ["smile", "hat", "beard"], [column("add", side="add", interval=True), column("both")])
    assert pivot.columns["add"].header == ["add", "add_low", "add_high", "add_images"]
    assert pivot.columns["both"].header == ["both"]
    assert pivot.cell("smile", "add") == Cell(0.75, *wilson_interval(3, 4), 4)
    assert pivot.cell("hat", "add") == Cell(None, None, None, 0)
    assert pivot.cell("hat", "both").value == 0
    smile, _, beard = pivot.rows()
    assert (smile.name, smile.cells["both"].value) == ("smile", 0.75)
    assert beard.cells["both"] == Cell(None, None, None, 0)
    # Each item is as important as another, however many images it has.
    assert pivot.figure("both") == Figure(0.375, "share")
    assert pivot.figure("add").value == 0.75
    assert math.isnan(Pivot([], ["smile"], [column("add")]).figure("add").value)


def test_a_share_of_several_columns_weighs_all_entries_alike():
    records = [record("a", "add", 1), record("a", "remove", 0), record("a", "remove", 0), record("b", "add", 1)]
    pivot = Pivot(records, ["a", "b"], [column("add", side="add"), column("remove", side="remove")])
    assert pivot.mean_share(["add", "remove"]) == pytest.approx(2 / 3)


def test_other_kinds_are_means_of_the_sides_means():
    values = {"add": [1.0, 2.0, math.inf, math.nan], "remove": [5.0]}
    records = [record("a", side, value, measure="psnr") for side, row in values.items() for value in row]
    pivot = Pivot([*records, record("b", "remove", 8, measure="psnr")], ["a", "b"], [column("p", "decibels", "psnr")])
    assert pivot.cell("a", "p").value == (1.5 + 5) / 2
    assert pivot.cell("b", "p").value == 8
    assert pivot.figure("p") == Figure(pytest.approx((1.5 + 5 + 8) / 3), "decibels")


def test_records_of_other_methods_measures_strengths_and_labels_are_left_out():
    records = [
        record("a", "", 1, strength=2.0, label="x"),
        record("a", "", 0, strength=4.0, label="x"),
        record("a", "", 0, strength=2.0, label="y"),
        record("a", "", 0, strength=2.0, method="theirs"),
        record("a", "", 0, strength=2.0, measure="kept"),
    ]
    columns = [column("x", strength=2.0, label="x"), column("all", strength=2.0), column("none", strength=3.0)]
    assert [pivot.value for pivot in Pivot(records, ["a"], columns).rows()[0].cells.values()] == [1, 0.5, None]


def test_means_add_up_in_float32_in_the_order_of_the_records():
    values = torch.rand(100, generator=torch.Generator().manual_seed(0)) * 1000
    total = torch.zeros(())
    for value in values:
        total = total + value
    records = [record("a", "", value, measure="loss") for value in values.tolist()]
    assert Pivot(records, ["a"], [column("l", "loss", "loss")]).cell("a", "l").value == float(total / 100)


def test_means_have_an_interval_of_the_bootstrap():
    values = [0.1, 0.4, 0.3, 0.9]
    records = [record("smile", side, value) for side in ("add", "remove") for value in values]
    records += [record("hat", "add", 2.0)]
    pivot = Pivot(records, ["smile", "hat", "beard"], [column("score", "score", interval=True), column("no", "score")])
    low, high = bootstrap_interval([torch.tensor(values)] * 2)
    assert pivot.cell("smile", "score") == (pytest.approx(0.425), pytest.approx(low), pytest.approx(high), 8)
    assert low < 0.425 < high
    assert pivot.cell("hat", "score") == Cell(2, 2, 2, 1)
    assert pivot.cell("beard", "score") == Cell(None, None, None, 0)
    assert pivot.cell("smile", "no")[1:3] == (None, None)
    shown = column("score", "score", bar=True)
    assert shown.text(Cell(0.425, 0.2, 0.6666, 8)) == "0.425 [0.2, 0.667]"
    assert column("gap", "difference").text(Cell(0.2, -0.01, 0.41, 8)) == "+20.0% [-1%, +41%]"
