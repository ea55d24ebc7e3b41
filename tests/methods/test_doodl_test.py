import csv
import json

import pytest
import torch
import yaml
from PIL import Image

from tests.tiny_clip import tiny_clip
from tokenlearn.errors import UserError
from tokenlearn.main import main
from tokenlearn.methods import Doodl, DoodlCase, DoodlTest
from tokenlearn.methods.doodl_test import AskedPicture
from tokenlearn.methods.image_guidance import ClassGuidance, SymmetryGuidance
from tokenlearn.methods.image_judges import ClassJudge, ClipTextJudge
from tokenlearn.models import StableDiffusion

STEPS, UPDATES = 3, 2


def doodl(guidances, **options):
    settings = {
        "prompts": ["a portrait", "a king"],
        "seeds": [3, 5],
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "optimisation_steps": UPDATES,
        "candidates": 2,
        "grad_scale": 500.0,
        "clip": 0.05,
    }
    return lambda backbone: Doodl(backbone, guidances, **(settings | options))


@pytest.fixture
def judge(tiny_models):
    return str(tiny_models / "judge")


@pytest.fixture
def make(tiny_models, judge):
    def task(*cases, **options):
        cases = cases or [
            DoodlCase(row="symmetric", judge=ClassJudge(judge, ["wizard"]), task=doodl([SymmetryGuidance()])),
            DoodlCase(
                row="symmetric",
                judge=ClassJudge(judge, ["pirate"]),
                task=doodl([SymmetryGuidance()], prompts=["a cat"], optimise_from=334),
            ),
        ]
        return DoodlTest(StableDiffusion(str(tiny_models / "pipeline")), list(cases), **options)

    return task


def asked(task):
    return [
        AskedPicture(case, one.pictures[index])
        for case, one in enumerate(task.tasks)
        for index in range(len(one.pictures.names))
    ]


def report_of(task):
    task.on_test_start()
    pictures = asked(task)
    task.test_step(pictures[:3])
    task.test_step(pictures[3:])
    task.on_test_epoch_end()
    return task.report


def cells(report, name):
    (found,) = (dict(zip(report.columns, row, strict=True)) for row in report.rows if row[0] == name)
    return found


def test_every_method_makes_the_pictures_and_the_judge_counts(make, judge):
    task = make()
    report = report_of(task)
    row = cells(report, "symmetric")
    for method in ("none", "one_step", "doodl"):
        ((first, second), pictures) = task.tasks, asked(task)
        ways = [
            one.edited_by(method, [own.picture for own in pictures if own.case == case])
            for case, one in enumerate((first, second))
        ]
        seen = torch.cat(
            [
                ClassJudge(judge, [label])(torch.stack([edited.edits[0] for edited in way]))
                for label, way in zip(("wizard", "pirate"), ways, strict=True)
            ]
        )
        assert row[f"{method}_images"] == 6
        assert row[method] == pytest.approx(seen.mean().item())
        assert report.summary[f"symmetric_{method}"] == pytest.approx(row[method])
    assert row["best_of_images"] == 4  # the other case has no first latents to choose among
    assert row["doodl_loss"] < row["none_loss"]
    assert row["best_of_loss"] <= row["none_loss"]


def test_network_evaluations_are_counted_by_rows(make):
    report = report_of(make())
    row = cells(report, "symmetric")
    # Four pictures of three steps and two of two, each with two prompts; those two begin with a step of the same.
    chain = (4 * 2 * STEPS + 2 * 2 * STEPS) / 6
    assert row["none_evaluations"] == chain
    assert row["one_step_evaluations"] == chain  # the plain picture is not drawn for it
    assert row["best_of_evaluations"] == 2 * 2 * STEPS
    # An update evaluates a chain twice, since it is recomputed on the way back.
    assert row["doodl_evaluations"] == pytest.approx(chain + UPDATES * 2 * (4 * 2 * STEPS + 2 * 2 * 2) / 6)
    assert row["doodl_seconds"] > 0


def test_realism_is_a_distance_to_real_pictures(make, judge, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for index in range(5):
        pixels = (255 * torch.rand(16, 20, 3, generator=generator)).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    report = report_of(make(realism_judge=judge, reference=str(tmp_path), reference_images=4))
    assert cells(report, "symmetric")["none_realism_distance"] > 0
    (tmp_path / "one").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "one" / "0.png")
    task = make(realism_judge=judge, reference=str(tmp_path / "one"))
    with pytest.raises(UserError, match="has 1 pictures"):
        task.on_test_start()


def test_rows_are_of_one_figure_each(make, judge, tmp_path):
    clip = str(tiny_clip(tmp_path / "clip"))
    classes = DoodlCase(row="class", judge=ClassJudge(judge, ["wizard"]), task=doodl([SymmetryGuidance()]))
    texts = DoodlCase(row="a text", judge=ClipTextJudge(clip, "a king"), task=doodl([SymmetryGuidance()]))
    report = report_of(make(classes, texts, methods=["none"]))
    of_classes, of_texts = cells(report, "class"), cells(report, "a text")
    assert of_classes["none"] is not None
    assert of_classes["none_clip_similarity"] is None
    assert of_texts["none"] is None
    assert -1 <= of_texts["none_clip_similarity"] <= 1
    assert report.summary["a_text_none"] == of_texts["none_clip_similarity"]
    assert report.kinds["a_text_none"] == "clip_similarity"
    mixed = DoodlCase(row="class", judge=ClipTextJudge(clip, "a king"), task=doodl([SymmetryGuidance()]))
    with pytest.raises(UserError, match="row 'class' give accuracy and clip_similarity; make it two rows"):
        make(classes, mixed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": []}, "model.methods must be different and at least one"),
        ({"methods": ["none", "none"]}, "model.methods must be different"),
        ({"batch_size": 0}, "batch_size"),
        ({"reference_images": 1}, "reference_images"),
        ({"realism_judge": "any"}, "'any' has nothing to compare with; set model.reference"),
    ],
)
def test_impossible_settings_are_refused(make, options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_a_judge_guides_nothing(make, tiny_models, judge):
    guide = ClassGuidance(str(tiny_models / "guide"), "wizard")
    for model, fails in ((str(tiny_models / "guide"), True), (judge, False)):
        case = DoodlCase(row="class", judge=ClassJudge(model, ["wizard"]), task=doodl([guide]))
        if fails:
            with pytest.raises(UserError, match="row 'class' is one of its guidances"):
                make(case)
        else:
            make(case)


def test_no_case_is_refused(tiny_models):
    with pytest.raises(UserError, match=r"model\.cases is empty"):
        DoodlTest(StableDiffusion(str(tiny_models / "pipeline")), [])


def test_the_table_is_written_by_the_command(tiny_models, judge, tmp_path, capsys):
    task = {
        "guidances": [
            {"class_path": "ClassGuidance", "init_args": {"classifier": str(tiny_models / "guide"), "label": "wizard"}}
        ],
        "prompts": ["a wizard"],
        "seeds": [1, 2],
        "num_inference_steps": STEPS,
        "optimisation_steps": 1,
        "candidates": 2,
    }
    case = {
        "row": "wizards",
        "judge": {"class_path": "ClassJudge", "init_args": {"classifier": judge, "labels": ["wizard"]}},
        "task": {"class_path": "Doodl", "init_args": task},
    }
    backbone = {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_models / "pipeline")}}
    settings = {
        "model": {"class_path": "DoodlTest", "init_args": {"backbone": backbone, "cases": [case]}},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
        "output_dir": str(tmp_path / "run"),
    }
    config = tmp_path / "doodl_test.yaml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    main(["test", "--config", str(config)])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary.keys() == {f"wizards_{method}" for method in ("none", "one_step", "best_of", "doodl")}
    with (tmp_path / "run" / "table.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["guidance"], row["doodl_images"]) == ("wizards", "2")
    for name in ("table.png", "wizards.png"):
        assert (tmp_path / "run" / name).is_file()
    assert "wizards_doodl" in capsys.readouterr().out
