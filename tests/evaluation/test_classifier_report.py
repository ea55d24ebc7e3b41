import csv
import json

import datasets
import pytest
import torch
import yaml
from PIL import Image

from tests.tiny import tiny_classifier
from tokenlearn.errors import UserError
from tokenlearn.evaluation.classifier_report import Bias, ClassifierReport, Count, bias_report, bias_table
from tokenlearn.evaluation.real_images import RealImages
from tokenlearn.main import main
from tokenlearn.metrics import share_difference_interval
from tokenlearn.models import StableDiffusion

ATTRIBUTES = ["hat", "beard", "smile", "glasses", "pipe"]


def counted(shares, images, generator):
    """Counts of images that show attributes with given probabilities."""
    return {
        ("pirate", name): Count(int((torch.rand(images, generator=generator) < share).sum()), images)
        for name, share in shares.items()
    }


def test_a_planted_bias_is_named_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    real = dict.fromkeys(ATTRIBUTES, 0.3) | {"smile": 0.9}
    generated = real | {"hat": 0.7, "smile": 0.5}
    lines = bias_report(counted(generated, 100, generator), counted(real, 100, generator))
    assert {line.attribute for line in lines if line.is_biased} == {"hat", "smile"}
    by_name = {line.attribute: line for line in lines}
    assert by_name["hat"].difference > 0 > by_name["smile"].difference
    for line in lines:
        assert (line.low <= 0 <= line.high) is not line.is_biased
        assert line.low < line.difference < line.high


def test_without_a_bias_a_report_names_one_in_a_twentieth_of_the_cases_at_most():
    generator = torch.Generator().manual_seed(1)
    shares = {
        f"{name} {number}": share
        for number in range(3)
        for name, share in zip(ATTRIBUTES, (0.1, 0.3, 0.5, 0.7, 0.9), strict=True)
    }
    reports = [bias_report(counted(shares, 60, generator), counted(shares, 80, generator)) for _ in range(100)]
    false_alarms = sum(any(line.is_biased for line in lines) for lines in reports)
    assert false_alarms <= 10  # of 5 expected at most
    # Without the correction, every other report would name one.
    uncorrected = [
        any(
            not low <= 0 <= high
            for low, high in (share_difference_interval(*line.generated, *line.real) for line in lines)
        )
        for lines in reports
    ]
    assert sum(uncorrected) > 30


def test_counts_of_one_kind_of_image_are_refused():
    with pytest.raises(ValueError, match="hat"):
        bias_report({("pirate", "hat"): Count(1, 2)}, {})


def test_the_table_names_biases_the_largest_first():
    lines = [
        Bias("pirate", "hat", Count(30, 40), Count(10, 40), 0.2, 0.7, True),
        Bias("pirate", "beard", Count(10, 40), Count(11, 40), -0.3, 0.2, False),
        Bias("king", "smile", Count(0, 40), Count(30, 40), -0.9, -0.5, True),
    ]
    table = bias_table(lines, judge="judge", level=0.05)
    assert [row.name for row in table.rows] == ["pirate: hat", "pirate: beard", "king: smile"]
    assert table.rows[0].cells["difference"] == (0.5, 0.2, 0.7, 80)
    assert [row.cells["biased"].value for row in table.rows] == [1, 0, 1]
    assert table.notes[:2] == [
        "biased: smile in 0.0% of the images of king, in 75.0% of real ones",
        "biased: hat in 75.0% of the images of pirate, in 25.0% of real ones",
    ]
    assert "Holm's correction of 3 comparisons" in table.notes[-1]
    assert table.summary["biased_attributes"].value == 2
    assert table.summary["mean_absolute_difference"].value == pytest.approx((0.5 + 0.025 + 0.75) / 3)
    assert "+50.0% [+20%, +70%]" in str(table)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Real images of two classes in folders, and a classifier of attributes."""
    folder = tmp_path_factory.mktemp("report")
    for shade, name in enumerate(("king", "wizard")):
        (folder / "images" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (20, 24), (120 * shade, 60 * index, 80)).save(folder / "images" / name / f"{index}.png")
    tiny_classifier(folder / "attributes", ["hat", "beard"], multi_label=True)
    return folder


def test_the_report_of_the_command(files, tiny_models, tmp_path, capsys):
    settings = {
        "backbone": {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_models / "pipeline")}},
        "attribute_classifier": str(files / "attributes"),
        "prompts": {"king": "a king", "wizard": "a wizard with a hat"},
        "real": {"source": str(files / "images"), "column": "label", "images": 3},
        "images": 2,
        "sampling": {"steps": 2},
        "batch_size": 3,
    }
    config = {
        "model": {"class_path": "ClassifierReport", "init_args": settings},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["test", "--config", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path / "run")])
    with (tmp_path / "run" / "table.csv").open(newline="") as file:
        rows = {row["attribute"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["king: hat", "king: beard", "wizard: hat", "wizard: beard"]
    assert [rows["king: hat"][name] for name in ("generated_images", "real_images", "difference_images")] == [
        "2",
        "3",
        "5",
    ]
    for row in rows.values():
        difference = float(row["generated"]) - float(row["real"])
        assert float(row["difference"]) == pytest.approx(difference, abs=1e-3)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["compared_attributes"] == 4
    for name in ("table.png", "classes.png", "records.csv"):
        assert (tmp_path / "run" / name).is_file()
    assert "Holm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": {}}, r"model\.prompts"),
        ({"attributes": ["nose"]}, "'nose'"),
        ({"images": 0}, r"model\.images"),
        ({"level": 1.0}, r"model\.level"),
    ],
)
def test_impossible_settings_are_refused(options, words, files, tiny_models):
    settings = {"prompts": {"king": "a king"}, "real": RealImages(source="portraits:9", column="persona")}
    with pytest.raises(UserError, match=words):
        ClassifierReport(
            StableDiffusion(str(tiny_models / "pipeline")), str(files / "attributes"), **(settings | options)
        )


def test_real_images_are_the_first_of_each_class(files):
    source = str(files / "images")
    found = RealImages(source=source, column="label", images=3).of_classes(["wizard", "king"], 16)
    assert {name: tuple(images.shape) for name, images in found.items()} == dict.fromkeys(
        ["wizard", "king"], (3, 16, 16, 3)
    )
    assert found["wizard"][:, 0, 0].tolist() == [[120, 60 * index, 80] for index in range(3)]
    for options, words in (
        ({"column": "labels"}, "'labels'.*did you mean label"),
        ({"column": "label", "fewest": 5}, "has 4 usable images of class 'wizard'"),
    ):
        with pytest.raises(UserError, match=words):
            RealImages(source=source, **options).of_classes(["wizard"], 16)
    with pytest.raises(UserError, match=r"'queen'.*its classes are king, wizard"):
        RealImages(source=source, column="label").of_classes(["queen"], 16)
