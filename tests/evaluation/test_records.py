import csv

import pytest
import torch

from tokenlearn.evaluation.records import Record, Records, write_records


def some_records(first=0):
    records = Records()
    seeds = [first, first + 1]
    records.update("success", torch.tensor([True, False]), seeds, method="caso", item="smile", side=["add", "remove"])
    records.update(
        "psnr", torch.tensor([0.1, torch.inf]), ["a.png", "ä.png"], method="caso", strength=2.5, label="hat"
    )
    return records


def test_a_record_per_image_in_order():
    assert some_records().compute() == [
        Record("caso", "smile", "add", "success", 0, 1.0),
        Record("caso", "smile", "remove", "success", 1, 0.0),
        Record("caso", "", "", "psnr", "a.png", torch.tensor(0.1).item(), 2.5, "hat"),
        Record("caso", "", "", "psnr", "ä.png", float("inf"), 2.5, "hat"),
    ]


def test_no_records():
    records = Records()
    records.update("success", torch.empty(0), [], method="caso")
    assert records.compute() == []


def test_records_of_several_processes_come_together():
    records, other = some_records(), some_records(7)
    theirs = torch.cat(other.text)
    records.distributed_available_fn = lambda: True
    records.dist_sync_fn = lambda state, group: [state, theirs]
    assert records.compute() == some_records().compute() + some_records(7).compute()
    empty = Records()
    empty.distributed_available_fn = lambda: True
    empty.dist_sync_fn = lambda state, group: [state, theirs]
    assert empty.compute() == some_records(7).compute()


@pytest.mark.filterwarnings("error")
def test_a_file_with_a_line_per_record(tmp_path):
    write_records(some_records().compute(), tmp_path / "records.csv")
    with (tmp_path / "records.csv").open(newline="") as file:
        header, first, *_, last = csv.reader(file)
    assert header == ["method", "item", "side", "measure", "seed", "value", "strength", "label"]
    assert first == ["caso", "smile", "add", "success", "0", "1", "", ""]
    assert last == ["caso", "", "", "psnr", "ä.png", "inf", "2.5", "hat"]
