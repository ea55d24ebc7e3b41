"""Malformed parquet files and metadata of folders: one line, or a warning of what they are taken for; never a wait."""

import json
import os
import time
import warnings

import datasets
import pytest
import torch

from tests.data.stand_ins import ImageTask, trainer_with
from tests.edges.hostile_tables import (
    GOOD,
    ROWS,
    damaged_files,
    other_columns,
    other_images,
    other_labels,
    parquet,
    table,
)
from tokenlearn.data import HeldOut, ImageDataModule, LabelColumns
from tokenlearn.errors import UserError
from tokenlearn.models.attributes import labelled_attributes
from tokenlearn.training.caso_initialisation import check_data_classes
from tokenlearn.training.caso_targets import present_classes


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def classes_in(source, streaming=False):
    """Class indices that a training reads, of the data as a task checks them."""
    labels = LabelColumns(columns={"smile": "smile"})
    data = ImageDataModule(
        str(source),
        held_out=HeldOut(2, 0),
        num_workers=0,
        batch_size=4,
        streaming=streaming,
        batches_per_epoch=2,
        labels=labels,
    )
    data.trainer = trainer_with(ImageTask())
    data.prepare_data()
    data.setup("fit")
    attributes = labelled_attributes({"smile": None})
    check_data_classes(attributes, data)
    found = set()
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        found |= set(present_classes(batch.labels, attributes, batch.images, None).flatten().tolist())
    return found


def outcome_of(source, streaming=False):
    """``refused``, or the classes that are read and the beginnings of warnings; a fault is raised."""
    started = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = classes_in(source, streaming)
        except UserError as error:
            line = str(error).replace(str(source), "")
            assert line.isprintable(), line
            assert len(line) < 400, line
            assert ";" in line, f"no way out in: {line}"
            found = "refused"
    if time.process_time() - started > 20:
        return "too slow"
    said = {word for warning in caught for word in ("taken for", "no 0 for") if word in str(warning.message)}
    return (found, said) if said else found


def wrong_outcomes(name, source, expected):
    """Outcomes of data as a whole and streamed that are not those expected."""
    wrong = {}
    for streaming, right in zip((False, True), expected, strict=True):
        try:
            found = outcome_of(source, streaming)
        except Exception as error:  # what is tested for
            found = f"{type(error).__name__}: {error}"[:300]
        if found != right:
            wrong[f"{name}{', streamed' if streaming else ''}"] = found
    return wrong


WHOLE = [
    ("null", {-1}, {-1}),
    ("null numbers", {-1}, {-1}),
    ("minus one and one", "refused", ({-1, 1}, {"no 0 for"})),
    ("numbers as words", ({0, 1}, {"taken for"}), "refused"),
    # The name of the class is the attribute's, and a stream does not tell the other.
    ("names and nothing", {0, 1}, "refused"),
    ("control characters", {0, 1}, "refused"),
    ("long names", {0, 1}, "refused"),
]


def test_every_malformed_parquet_file(tmp_path, count_sweep):
    contents = {f"damaged, {name}": content for name, content in damaged_files()}
    contents |= {f"columns, {name}": parquet(content) for name, content in other_columns()}
    contents |= {f"images, {name}": parquet(table(column)) for name, column in other_images()}
    contents |= {f"labels, {name}": parquet(table(smile=column)) for name, column in other_labels()}
    expected = {f"labels, {name}": outcomes for name, *outcomes in WHOLE}
    failures = {}
    for index, (name, content) in enumerate(contents.items()):
        path = tmp_path / f"{index}.parquet"
        path.write_bytes(content)
        failures |= wrong_outcomes(name, path, expected.get(name, ["refused"] * 2))
    count_sweep("parquet files, whole and streamed", 2 * len(contents), failures)
    assert not failures
    assert len(contents) >= 60


def rows(names, smiles, column="file_name"):
    return "".join([f"{column},smile\n", *(f"{name},{smile}\n" for name, smile in zip(names, smiles, strict=True))])


NAMES = [f"{index}.png" for index in range(ROWS)]
SMILES = [index % 2 for index in range(ROWS)]
LINES = [json.dumps({"file_name": name, "smile": smile}) for name, smile in zip(NAMES, SMILES, strict=True)]
METADATA = {
    "csv: no file names": ("metadata.csv", rows(NAMES, SMILES, "name"), "refused"),
    "csv: empty": ("metadata.csv", "", "refused"),
    "csv: a header alone": ("metadata.csv", "file_name,smile\n", "refused"),
    "csv: no labels": ("metadata.csv", "file_name\n" + "\n".join(NAMES), "refused"),
    "csv: semicolons": ("metadata.csv", rows(NAMES, SMILES).replace(",", ";"), "refused"),
    "csv: a quote that does not end": ("metadata.csv", rows(NAMES, SMILES).replace("3.png", '"3.png'), "refused"),
    "csv: one row is longer": ("metadata.csv", rows(NAMES, SMILES).replace("3.png,1", "3.png,1,1"), "refused"),
    "csv: zeros": ("metadata.csv", "\0" * 100, "refused"),
    "csv: a byte-order mark": ("metadata.csv", "\ufeff" + rows(NAMES, SMILES), {0, 1}),
    "csv: images that are not there": ("metadata.csv", rows([f"x{name}" for name in NAMES], SMILES), "refused"),
    "csv: images outside": ("metadata.csv", rows([f"../../{name}" for name in NAMES], SMILES), "refused"),
    "csv: absolute paths": ("metadata.csv", rows(["/etc/hostname"] * ROWS, SMILES), "refused"),
    "csv: empty file names": ("metadata.csv", rows([""] * ROWS, SMILES), "refused"),
    "csv: numbers as file names": ("metadata.csv", rows(range(ROWS), SMILES), "refused"),
    "csv: labels that are formulas": ("metadata.csv", rows(NAMES, ["=1+1"] * ROWS), "refused"),
    "csv: infinite": ("metadata.csv", rows(NAMES, [*SMILES[1:], "inf"]), "refused"),
    "csv: empty labels": ("metadata.csv", rows(NAMES, [*SMILES[1:], ""]), {-1, 0, 1}),
    "csv: truth values": ("metadata.csv", rows(NAMES, ["true", "false"] * (ROWS // 2)), {0, 1}),
    "jsonl: cut": ("metadata.jsonl", "\n".join(LINES)[:-5], "refused"),
    "jsonl: a list": ("metadata.jsonl", json.dumps([1, 2]), "refused"),
    "jsonl: null": ("metadata.jsonl", "null\n" * ROWS, "refused"),
    "jsonl: numbers": ("metadata.jsonl", "3\n" * ROWS, "refused"),
    "jsonl: one object": ("metadata.jsonl", "{}", "refused"),
    "jsonl: file names of numbers": ("metadata.jsonl", '{"file_name": 3, "smile": 1}\n' * ROWS, "refused"),
    "jsonl: file names of null": ("metadata.jsonl", '{"file_name": null, "smile": 1}\n' * ROWS, "refused"),
    "jsonl: mixed kinds": ("metadata.jsonl", "\n".join(LINES).replace('"smile": 1', '"smile": [1]'), "refused"),
    "jsonl: some without labels": ("metadata.jsonl", "\n".join(LINES).replace(', "smile": 0', ""), {-1, 1}),
    "jsonl: text": ("metadata.jsonl", "words", "refused"),
}


def test_every_malformed_metadata(tmp_path, count_sweep):
    failures = {}
    for index, (name, (file, content, right)) in enumerate(METADATA.items()):
        folder = tmp_path / str(index)
        folder.mkdir()
        for image, encoded in zip(NAMES, GOOD, strict=True):
            (folder / image).write_bytes(encoded)
        (folder / file).write_text(content)
        failures |= wrong_outcomes(name, folder, [right] * 2)
    count_sweep("metadata of folders, whole and streamed", 2 * len(METADATA), failures)
    assert not failures


def test_classes_beyond_those_of_the_attribute_are_refused():
    (smile,) = labelled_attributes({"smile": None})
    with pytest.raises(UserError, match=r"the data have class 2 of 'smile', whose 2 classes in the model"):
        present_classes({"smile": torch.tensor([0, 2])}, [smile], torch.zeros(2), None)


def test_a_folder_named_like_a_file_and_a_pipe(tmp_path):
    (tmp_path / "data.parquet").mkdir()
    os.mkfifo(tmp_path / "pipe.parquet")
    for name in ("data.parquet", "pipe.parquet", "missing.parquet", "*.parquet"):
        assert outcome_of(tmp_path / name) == "refused"
