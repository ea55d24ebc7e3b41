import csv
import json

import datasets
import pytest
import torch
import yaml
from PIL import Image

from tokenlearn.errors import UserError
from tokenlearn.evaluation.augmentation import (
    AUGMENTED,
    REAL,
    RIVAL,
    AugmentationEvaluation,
    ClassifierTraining,
    augmentation_table,
    train_classifier,
)
from tokenlearn.evaluation.real_images import RealImages
from tokenlearn.evaluation.records import Record
from tokenlearn.main import main
from tokenlearn.metrics import two_way_bootstrap_interval
from tokenlearn.models import StableDiffusion

TINY = ClassifierTraining(architecture="test_resnet", steps=3, batch_size=4)


def records(method, number, table):
    return [
        Record(method, str(number), f"run {run}", "correct", f"image {image}", value)
        for run, values in enumerate(table)
        for image, value in enumerate(values)
    ]


def test_the_difference_is_of_the_same_runs_and_images():
    # Every image that is right with real images is right with both, and two more are.
    real, both = [[1, 0, 0, 1], [1, 0, 0, 0]], [[1, 1, 0, 1], [1, 0, 1, 0]]
    measured = records(REAL, 5, real) + records(AUGMENTED, 5, both)
    table = augmentation_table(list(reversed(measured)), [5])
    (row,) = table.rows
    assert row.name == "5 real images a class"
    assert [row.cells[name].value for name in (REAL, AUGMENTED, "difference")] == [0.375, 0.625, 0.25]
    gap = torch.tensor(both) - torch.tensor(real)
    # In the order of runs, of which the resamples see another one here.
    assert row.cells["difference"][1:3] == two_way_bootstrap_interval(gap.float())
    assert row.cells["difference"].images == 8
    assert {name: figure.value for name, figure in table.summary.items()} == {
        "real_5": 0.375,
        "real_and_generated_5": 0.625,
        "difference_5": 0.25,
    }


def test_a_rival_has_differences_of_its_own():
    measured = records(REAL, 5, [[0, 0, 1, 0]]) + records(AUGMENTED, 5, [[1, 1, 1, 0]])
    table = augmentation_table(measured + records(RIVAL, 5, [[1, 1, 1, 1]]), [5])
    assert {name: figure.value for name, figure in table.summary.items()} == {
        "real_5": 0.25,
        "real_and_generated_5": 0.75,
        "real_and_rival_5": 1.0,
        "difference_5": 0.5,
        "rival_difference_5": 0.75,
        "over_rival_5": -0.25,
    }


def test_rival_prompts_are_of_the_same_classes(images, tiny_models):
    with pytest.raises(UserError, match="same classes, and 'wizard' is in one alone"):
        make(images, tiny_models, rival_prompts={"king": "a man with a crown"})


def test_a_rival_is_generated_by_its_own_prompts(images, tiny_models):
    evaluation = make(images, tiny_models, rival_prompts={"king": "a man", "wizard": "a person"}, generated=2)
    batches = [kind for batch in evaluation.test_dataloader() for kind in batch]
    assert [kind[:2] for kind in batches[::2]] == [
        (method, name) for method in (AUGMENTED, RIVAL) for name in ("king", "wizard")
    ]
    assert [seed for *_, seed in batches] == 4 * [1000, 1001]


def test_a_classifier_learns_what_it_is_given():
    """Dark and light images, beside noise that says nothing."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat_interleave(12)
    shade = torch.tensor([60, 190])[labels][:, None, None, None]
    pixels = (shade + torch.randint(-40, 40, (24, 32, 32, 3), generator=generator)).byte()
    training = ClassifierTraining(architecture="test_resnet", steps=25, batch_size=8, learning_rate=5e-3)
    state = torch.get_rng_state()
    with torch.inference_mode():  # as in a Trainer's test
        classifier = train_classifier(pixels, labels, 2, training, seed=0, device=torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    images = pixels.movedim(-1, 1).float() / 255
    assert (classifier(images).argmax(dim=1) == labels).float().mean() > 0.9
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_the_same_seed_begins_with_the_same_weights():
    pixels, labels = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.arange(4) % 2
    still = ClassifierTraining(architecture="test_resnet", steps=1, batch_size=2, learning_rate=0.0)
    first, same, other = (
        train_classifier(pixels, labels, 2, still, seed=seed, device=torch.device("cpu")).model.state_dict()
        for seed in (0, 0, 1)
    )
    weights = [name for name in first if name.endswith("conv1.weight")]
    assert all(torch.equal(first[name], same[name]) for name in weights)
    assert not any(torch.equal(first[name], other[name]) for name in weights)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("augmentation")
    for shade, name in enumerate(("king", "wizard")):
        (folder / name).mkdir()
        for index in range(6):
            Image.new("RGB", (20, 24), (200 * shade, 30 * index, 80)).save(folder / name / f"{index}.png")
    return str(folder)


def test_the_table_of_the_command(images, tiny_models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tokenlearn.progress.INTERVAL", 0.0)  # every step is due
    settings = {
        "backbone": {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_models / "pipeline")}},
        "prompts": {"king": "a king", "wizard": "a wizard"},
        "real": {"source": images, "column": "label", "images": 6},
        "numbers": [1, 2],
        "generated": 2,
        "held_out": 3,
        "runs": 2,
        "training": {"architecture": "test_resnet", "steps": 2, "batch_size": 4},
        "sampling": {"steps": 2},
    }
    config = {
        "model": {"class_path": "AugmentationEvaluation", "init_args": settings},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["test", "--config", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path / "run")])
    with (tmp_path / "run" / "table.csv").open(newline="") as file:
        rows = {row["trained on"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["1 real images a class", "2 real images a class"]
    for row in rows.values():
        assert row["difference_images"] == "12"  # two runs, three images of two classes
        assert float(row["difference_low"]) <= float(row["difference"]) <= float(row["difference_high"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["difference_2"] == pytest.approx(summary["real_and_generated_2"] - summary["real_2"])
    with (tmp_path / "run" / "records.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 2 * 2 * 2 * 6
    printed = capsys.readouterr()
    assert "test_resnet from random weights" in printed.out
    assert "training classifiers: 3 of 8 classifiers" in printed.err
    assert "1 training step into the next" in printed.err


def test_more_real_images_contain_the_fewer_and_never_the_held_out(images, tiny_models):
    evaluation = make(images, tiny_models, numbers=[1, 3], held_out=3)
    evaluation.real_pixels = evaluation.real.of_classes(evaluation.class_names, 16)
    held_out = {tuple(pixels[0, 0].tolist()) for part in evaluation.real_pixels.values() for pixels in part[-3:]}
    for run in range(3):
        few, more = (
            {tuple(pixels[0, 0].tolist()) for pixels in evaluation._drawn(number, run)[0]} for number in (1, 3)
        )
        assert len(few) == 2
        assert few < more
        assert not more & held_out
    assert evaluation._drawn(3, 0)[1].tolist() == [0, 0, 0, 1, 1, 1]


def make(images, tiny_models, **options):
    settings = {
        "prompts": {"king": "a king", "wizard": "a wizard"},
        "real": RealImages(source=images, column="label", images=6),
        "numbers": [2],
        "held_out": 2,
        "training": TINY,
    }
    return AugmentationEvaluation(StableDiffusion(str(tiny_models / "pipeline")), **(settings | options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": {"king": "a king"}}, "1 classes"),
        ({"numbers": []}, r"model\.numbers"),
        ({"numbers": [2, 2]}, r"model\.numbers"),
        ({"numbers": [5]}, r"real\.images 6.*set it to 7"),
        ({"runs": 0}, r"model\.runs"),
    ],
)
def test_impossible_settings_are_refused(options, words, images, tiny_models):
    with pytest.raises(UserError, match=words):
        make(images, tiny_models, **options)


def test_impossible_trainings_are_refused():
    with pytest.raises(UserError, match=r"architecture 'resnet10'.*did you mean resnet"):
        ClassifierTraining(architecture="resnet10")
    with pytest.raises(UserError, match=r"training\.steps"):
        ClassifierTraining(steps=0)
