"""The command ``tokenlearn classifier``: what it leaves, that its parts share nothing, and that it goes on."""

import csv
import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.command_line import error_of
from tokenlearn import classifier_training
from tokenlearn.classifier_training import augmented
from tokenlearn.data.image_arrays import split_parts
from tokenlearn.data.image_source import open_images
from tokenlearn.main import main
from tokenlearn.models.classifier import TimmClassifier
from tokenlearn.objectives import ClassifierLoss, require_judge_differs

COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220)}
NAMES = sorted(COLOURS)
OPTIONS = ("--guide", "test_resnet", "--judge", "test_vit", "--size", "32", "--batch_size", "8", "--steps", "4")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path):
    """Twelve images of either colour, each another one."""
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(12):
            pixels = np.clip(np.asarray(colour) + generator.normal(0, 25, (40, 36, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


def train(source, folder, *options):
    main(["classifier", str(source), "--output_dir", str(folder), *OPTIONS, *options])
    return json.loads((folder / "summary.json").read_text())


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_two_classifiers_with_honest_accuracies(photos, tmp_path, capsys):
    folder = tmp_path / "out"
    summary = train(photos, folder, "--steps", "30", "--learning_rate", "0.01")
    splits = rows_of(folder / "splits.csv")
    parts = {part: {row["image"] for row in splits if row["part"] == part} for part in ("guide", "judge", "test")}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 24
    table = rows_of(folder / "table.csv")
    assert [row["class"] for row in table] == NAMES
    assert [row["test_images"] for row in table] == ["2", "2"]
    held_out = [row for row in splits if row["part"] == "test"]
    for role in ("guide", "judge"):
        classifier = TimmClassifier(str(folder / role))
        assert classifier.label_names == tuple(NAMES)
        assert classifier.preprocess(torch.rand(1, 3, 50, 40)).shape == (1, 3, 32, 32)
        correct = 0
        for row in held_out:
            image = Image.open(photos / row["image"]).resize((32, 36), Image.Resampling.BICUBIC).crop((0, 2, 32, 34))
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
            correct += classifier(pixels).argmax() == classifier.label_index(row["label"])
        assert summary[f"{role}_accuracy"] == pytest.approx(float(correct) / len(held_out))
        low, high = summary[f"{role}_accuracy_low"], summary[f"{role}_accuracy_high"]
        assert 0 <= low <= summary[f"{role}_accuracy"] <= high <= 1
        assert f"{summary[f'{role}_accuracy']:.1%}" in (folder / role / "README.md").read_text()
    assert summary["guide_accuracy"] == 1  # colours are learned in thirty steps
    require_judge_differs(ClassifierLoss(str(folder / "judge")), ClassifierLoss(str(folder / "guide")))
    assert not (folder / "work").exists()
    printed = capsys.readouterr().out
    assert f"--model.judge.classifier {folder / 'judge'}" in printed


def test_a_stopped_command_goes_on_and_ends_the_same(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classifier_training, "_CHECKPOINT_EVERY", 2)
    train(photos, tmp_path / "whole")
    step = classifier_training.ClassifierModule.training_step

    def stopping(module, batch):
        if module.global_step == 3 and module.settings.architecture == "test_vit":
            raise SystemExit(130)
        return step(module, batch)

    with monkeypatch.context() as changed:
        changed.setattr(classifier_training.ClassifierModule, "training_step", stopping)
        with pytest.raises(SystemExit):
            train(photos, tmp_path / "stopped")
    assert (tmp_path / "stopped" / "guide").is_dir()
    assert not (tmp_path / "stopped" / "judge").exists()
    error = error_of(
        ["classifier", str(photos), "--output_dir", str(tmp_path / "stopped"), *OPTIONS[:-1], "9"], capsys
    )
    assert "other images or settings" in error
    started = []

    def counting(module, batch):
        started.append(module.global_step)
        return step(module, batch)

    monkeypatch.setattr(classifier_training.ClassifierModule, "training_step", counting)
    train(photos, tmp_path / "stopped")
    assert started == [2, 3]  # of the judge, from its checkpoint
    for name in ("guide", "judge"):
        whole, stopped = (tmp_path / run / name / "model.safetensors" for run in ("whole", "stopped"))
        assert whole.read_bytes() == stopped.read_bytes()
    train(photos, tmp_path / "stopped")
    assert started == [2, 3]
    assert "has these classifiers already" in capsys.readouterr().err


def table_of(photos, path, delimiter=","):
    files = sorted(photos.rglob("*.png"))
    lines = [f"{file.relative_to(path.parent)}{delimiter}{file.parent.name}" for file in files]
    path.write_text("\n".join([f"path{delimiter}colour", *lines]))
    return path


def test_a_table_is_a_source_too(photos, tmp_path):
    table = table_of(photos, tmp_path / "labels.csv", ";")
    summary = train(table, tmp_path / "out", "--label_column", "colour")
    assert summary["classes"] == NAMES
    assert {row["image"] for row in rows_of(tmp_path / "out" / "splits.csv")} == {
        str(file.relative_to(tmp_path)) for file in photos.rglob("*.png")
    }
    dataset = open_images(str(table)).open()
    assert Image.open(dataset[0]["image"]["path"]).size == (36, 40)
    before = open_images(str(table)).fingerprint
    Image.new("RGB", (30, 30)).save(sorted(photos.rglob("*.png"))[0])
    assert open_images(str(table)).fingerprint != before
    assert len(list(open_images(str(table), streaming=True).open())) == 24


def test_unusable_images_are_one_warning(photos, tmp_path):
    (photos / "red" / "broken.png").write_bytes(b"not an image")
    shutil.copy(photos / "red" / "0.png", photos / "blue" / "copy.png")
    with pytest.warns(UserWarning, match=r"left out") as caught:
        train(photos, tmp_path / "out")
    (line,) = [str(warning.message) for warning in caught if "left out of" in str(warning.message)]
    assert "1 images that cannot be read, such as 'red/broken.png'" in line
    assert "1 copies of other images, 1 of them with another label" in line
    assert len(rows_of(tmp_path / "out" / "splits.csv")) == 24


def remove(photos, name, number):
    for file in sorted((photos / name).iterdir())[:number]:
        file.unlink()


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda photos: remove(photos, "red", 3), [], ["'red' (9)", "fewer than 10"]),
        (lambda photos: shutil.rmtree(photos / "red"), [], ["two or more classes", "path,label"]),
        (lambda photos: shutil.rmtree(photos), [], ["does not exist"]),
        (lambda photos: [file.rename(photos / file.name) for file in (photos / "red").iterdir()], [], ["path,label"]),
        (None, ["--judge", "test_resnet.r160_in1k"], ["both test_resnet", "another judge"]),
        (None, ["--judge", "regnetx_02"], ["'regnetx_02'", "regnetx_002"]),
        (None, ["--test_share", "1"], ["test_share"]),
        (None, ["--steps", "0"], ["steps", "0"]),
        (None, ["--label_column", "colour"], ["'colour'", "label"]),
        (None, ["--pretrained", "true"], ["test_resnet", "--pretrained false"]),
    ],
)
def test_mistakes_are_one_line(photos, tmp_path, capsys, change, options, words):
    if change is not None:
        change(photos)
    command = ["classifier", str(photos), "--output_dir", str(tmp_path / "out"), *OPTIONS, *options]
    error = error_of(command, capsys)
    for word in words:
        assert word in error


def test_one_class_is_not_enough(photos, tmp_path, capsys):
    table = table_of(photos, tmp_path / "labels.csv")
    table.write_text("\n".join(line for line in table.read_text().splitlines() if not line.endswith("red")))
    command = ["classifier", str(table), "--label_column", "colour", "--output_dir", str(tmp_path / "out"), *OPTIONS]
    error = error_of(command, capsys)
    for word in ("one class", "'blue'", "'other'"):
        assert word in error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("photo,label\na.png,x\n", ["no column of images", "path,label"]),
        ("path,label\n", ["no rows"]),
        ("path,label\n" + "a" * 200_000 + ",x\n", ["cannot read the table", "field"]),
        ("path,label\na.png,x,y\n", ["row 1", "double quotes"]),
    ],
)
def test_wrong_tables_are_one_line(tmp_path, capsys, text, words):
    (tmp_path / "labels.csv").write_text(text)
    error = error_of(["classifier", str(tmp_path / "labels.csv"), "--output_dir", str(tmp_path / "out")], capsys)
    for word in words:
        assert word in error


def test_one_folder_at_a_time(tmp_path, capsys):
    assert "takes one folder or file" in error_of(["classifier", "a", "b"], capsys)


def test_parts_have_a_share_of_every_class():
    labels = np.repeat([0, 1], [30, 11])
    parts = split_parts(labels, test_share=0.2, seed=1)
    assert sorted(np.concatenate(parts).tolist()) == list(range(41))
    assert [np.bincount(labels[part]).tolist() for part in parts] == [[12, 5], [12, 4], [6, 2]]
    assert split_parts(labels, test_share=0.2, seed=2).test.tolist() != parts.test.tolist()


def test_augmentation_depends_on_its_generator_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    one, same, another = (augmented(pixels, torch.Generator().manual_seed(seed), True) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, another)
    assert one.shape == (3, 24, 24)
    assert one.min() >= 0
    assert one.max() <= 1
