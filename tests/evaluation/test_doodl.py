import csv
import json
from typing import get_args

import lightning as L
import pytest
import torch
import yaml
from PIL import Image

from tests.tiny_clip import tiny_clip
from tokenlearn.diffusion.latent_optimisation import LatentOptimisation
from tokenlearn.errors import UserError
from tokenlearn.evaluation.doodl import DoodlEvaluation, DoodlMethod
from tokenlearn.evaluation.doodl_cases import DoodlCase, LocalSearch
from tokenlearn.evaluation.realism import Realism
from tokenlearn.generation import Doodl
from tokenlearn.guidance import ClassifierGuidance, ComposableGuidance, TFGSettings
from tokenlearn.main import main
from tokenlearn.models import StableDiffusion
from tokenlearn.objectives import ClassifierLoss, CLIPTextLoss, SymmetryLoss
from tokenlearn.pipeline import Pipeline, Sampling

STEPS, UPDATES = 3, 2
PROMPTS, SEEDS = ["a portrait", "a king"], [3, 5]
OPTIMISATION = LatentOptimisation(steps=UPDATES, grad_scale=500.0, clip=0.05)
LATER = LatentOptimisation(steps=UPDATES, grad_scale=500.0, clip=0.05, from_timestep=334)
SAMPLING = Sampling(steps=STEPS, guidance=3.0, solver="DDIM")
STRENGTH = 100.0


def case(row, judge, **options):
    settings = {
        "objective": SymmetryLoss(),
        "prompts": PROMPTS,
        "seeds": SEEDS,
        "sampling": SAMPLING,
        "optimisation": OPTIMISATION,
        "candidates": 2,
    }
    return DoodlCase(row=row, judge=judge, **(settings | options))


@pytest.fixture
def judge(tiny_models):
    return str(tiny_models / "judge")


@pytest.fixture
def backbone(tiny_models):
    return StableDiffusion(str(tiny_models / "pipeline"))


@pytest.fixture
def make(backbone, judge):
    def evaluation(*cases, **options):
        cases = cases or [
            case("symmetric", ClassifierLoss(judge, "wizard")),
            case("symmetric", ClassifierLoss(judge, "pirate"), prompts=["a cat"], optimisation=LATER),
        ]
        return DoodlEvaluation(backbone, list(cases), **options)

    return evaluation


def table_of(evaluation):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.test(evaluation, verbose=False)
    return evaluation.table


def row(table, name):
    """Value of each column, and its number of images."""
    (cells,) = (row.cells for row in table.rows if row.name == name)
    values = {column: cell.value for column, cell in cells.items()}
    return values | {f"{column}_images": cell.images for column, cell in cells.items()}


def by_hand(method, backbone, prompts, optimisation):
    """Images of prompts with all seeds by other ways to the same."""
    pairs = [(prompt, seed) for prompt in prompts for seed in SEEDS]
    pipeline = Pipeline(backbone, sampling=SAMPLING)
    if method == "doodl":
        task = Doodl(
            backbone, SymmetryLoss(), prompts=prompts, seeds=SEEDS, sampling=SAMPLING, optimisation=optimisation
        )
        images = [task.images[index] for index in range(len(pairs))]
        return torch.cat([result.edits for result in task.edit_images(images)])
    rule = ClassifierGuidance(SymmetryLoss(), STRENGTH, 3.0) if method == "one_step" else None
    with torch.no_grad():
        return pipeline.generate(*zip(*pairs, strict=True), rule=rule).clamp(0, 1)


def test_every_method_makes_the_images_and_the_judge_counts(make, backbone, judge):
    evaluation = make()
    table = table_of(evaluation)
    found = row(table, "symmetric")
    for method in ("none", "doodl"):
        scores = torch.cat(
            [
                ClassifierLoss(judge, label).score(by_hand(method, backbone, prompts, optimisation))
                for label, prompts, optimisation in (("wizard", PROMPTS, OPTIMISATION), ("pirate", ["a cat"], LATER))
            ]
        )
        assert found[f"{method}_images"] == 6
        assert found[method] == pytest.approx(scores.mean().item())
    for method in ("none", "one_step", "doodl"):
        assert found[f"{method}_images"] == 6
        assert table.summary[f"symmetric_{method}"].value == pytest.approx(found[method])
    assert found["best_of_images"] == 4  # the other case has no first latents to choose among
    assert found["doodl_loss"] < found["none_loss"]
    assert found["best_of_loss"] <= found["none_loss"]
    assert str(table.summary["symmetric_none"]).endswith("%")


def test_one_step_guidance_is_a_rule_of_the_sampler(make, backbone, judge):
    table = table_of(make(case("symmetric", ClassifierLoss(judge, "wizard")), methods=["one_step"]))
    images = by_hand("one_step", backbone, PROMPTS, OPTIMISATION)
    losses = {record.seed: record.value for record in table.records if record.measure == "loss"}
    assert list(losses.values()) == pytest.approx(SymmetryLoss()(images).tolist())
    assert [name.rpartition("seed")[2] for name in losses] == ["3", "5", "3", "5"]


def test_network_evaluations_are_counted_by_rows(make):
    found = row(table_of(make()), "symmetric")
    # Four images of three steps and two of two, each with two prompts; those two begin with a step of the same.
    plain = (4 * 2 * STEPS + 2 * 2 * STEPS) / 6
    assert found["none_evaluations"] == plain
    assert found["one_step_evaluations"] == found["tfg_evaluations"] == plain
    assert found["best_of_evaluations"] == found["search_evaluations"] == 2 * 2 * STEPS
    # An update evaluates the sampler twice, since it is recomputed on the way back.
    assert found["doodl_evaluations"] == pytest.approx(plain + UPDATES * 2 * (4 * 2 * STEPS + 2 * 2 * 2) / 6)
    assert found["doodl_seconds"] > 0


def test_searches_cost_what_they_are_allowed(make, judge):
    settings = TFGSettings(recurrence=2)
    assert settings.cost == 6  # both recurrences, and a backward pass as two evaluations
    compared = case("symmetric", ClassifierLoss(judge, "wizard"), candidates=13, tfg=settings)
    found = row(table_of(make(compared, methods=["none", "best_of", "search", "tfg", "best_of_tfg"])), "symmetric")
    plain = 2 * STEPS
    assert found["none_cost"] == plain
    assert found["tfg_cost"] == 6 * plain
    assert found["best_of_cost"] == found["search_cost"] == 13 * plain
    assert found["best_of_tfg_cost"] == 2 * 6 * plain
    assert found["tfg_evaluations"] == 2 * plain
    assert found["best_of_loss"] < found["none_loss"]


def test_the_optimisation_costs_as_much_as_its_candidates(make, judge):
    updates = 3
    given = case(
        "symmetric", ClassifierLoss(judge, "wizard"), candidates=None, optimisation=LatentOptimisation(updates)
    )
    found = row(table_of(make(given, methods=["none", "best_of", "doodl"])), "symmetric")
    # The last image of the optimisation is sampled once more.
    assert found["doodl_cost"] == found["best_of_cost"] + found["none_cost"]


def test_the_text_of_the_objective_as_the_prompt(make, backbone, judge, tmp_path):
    clip = str(tiny_clip(tmp_path / "clip"))
    wizard, named = ClassifierLoss(judge, "wizard"), {"wizard": "a person", "pirate": "a man"}
    texts = {"wizard": "a man with a hat", "pirate": "a king"}
    described = case(
        "texts", wizard, objective=[SymmetryLoss(), CLIPTextLoss(clip, texts)], prompts=[], for_each=named
    )
    table = table_of(make(described, case("none", wizard), methods=["none", "text_as_prompt"]))
    prompts = [text for text in texts.values() for _ in SEEDS]
    images = Pipeline(backbone, sampling=SAMPLING).generate(prompts, SEEDS * 2).clamp(0, 1)
    scores = {
        record.label: record.value
        for record in table.records
        if (record.method, record.measure, record.seed[-1]) == ("text_as_prompt", "loss", "5")
    }
    objective = SymmetryLoss() + CLIPTextLoss(clip, texts)
    losses = objective(images, 0, [name for name in texts for _ in SEEDS])
    assert [scores["wizard"], scores["pirate"]] == pytest.approx(losses[1::2].tolist(), rel=1e-4)
    assert row(table, "none")["text_as_prompt"] is None  # its objective has no text


def test_the_table_says_how_images_were_sampled(make, judge):
    wizard = ClassifierLoss(judge, "wizard")
    few = Sampling(steps=2, guidance=7.5, solver="DPMSolverMultistep")
    table = table_of(make(case("three", wizard), case("two", wizard, sampling=few), methods=["none"]))
    assert row(table, "three")["sampling_steps"] == 3
    assert row(table, "two")["guidance_scale"] == 7.5
    assert "three: 3 steps of DDIM at guidance 3" in str(table)
    assert "two: 2 steps of DPMSolverMultistep at guidance 7.5" in str(table)


def test_evaluations_are_not_counted_after_the_test(make, backbone):
    table_of(make(methods=["none"]))
    assert not backbone._forward_pre_hooks


def test_a_target_for_each_prompt(make, tiny_models, judge):
    named = {"wizard": "a portrait", "pirate": "a king"}
    together = case(
        "named",
        ClassifierLoss(judge),
        objective=ClassifierLoss(str(tiny_models / "guide")),
        prompts=[],
        for_each=named,
    )
    apart = [
        case(
            "named",
            ClassifierLoss(judge, label),
            objective=ClassifierLoss(str(tiny_models / "guide"), label),
            prompts=[prompt],
        )
        for label, prompt in named.items()
    ]
    one, two = table_of(make(together)), table_of(make(*apart))
    losses = [
        [record.value for record in table.records if (record.measure, record.method) == ("loss", method)]
        for table in (one, two)
        for method in ("none", "one_step", "best_of", "doodl")
    ]
    assert losses[:4] == [pytest.approx(values, rel=1e-4) for values in losses[4:]]
    assert {record.label for record in one.records} == {"wizard", "pirate"}
    with pytest.raises(UserError, match=r"row 'named'.*'nobody'"):
        make(case("named", ClassifierLoss(judge), prompts=[], for_each={"nobody": "a king"}))


def test_photos_are_inverted_without_best_of(make, judge, tmp_path):
    for index in range(2):
        Image.new("RGB", (16, 16 + 8 * index), ("red", "blue")[index]).save(tmp_path / f"{index}.png")
    photos = case(
        "photos", ClassifierLoss(judge, "wizard"), prompts=[], images=str(tmp_path), sampling=Sampling(steps=3)
    )
    found = row(table_of(make(photos)), "photos")
    counts = {method: found[f"{method}_images"] for method in get_args(DoodlMethod)}
    assert counts == dict.fromkeys(counts, 0) | {"none": 2, "one_step": 2, "doodl": 2}
    assert found["doodl_loss"] < found["none_loss"]


def test_realism_is_a_distance_to_real_images(make, judge, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for index in range(5):
        pixels = (255 * torch.rand(16, 20, 3, generator=generator)).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    realism = Realism(judge=judge, reference=str(tmp_path), images=4)
    found = row(table_of(make(realism=realism, methods=["none"])), "symmetric")
    assert found["none_realism_distance"] > 0
    (tmp_path / "one").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "one" / "0.png")
    with pytest.raises(UserError, match="has 1 images"):
        table_of(make(realism=Realism(judge=judge, reference=str(tmp_path / "one"))))


def test_rows_are_of_one_score_each(make, judge, tmp_path):
    clip = str(tiny_clip(tmp_path / "clip"))
    classes = case("class", ClassifierLoss(judge, "wizard"))
    texts = case("a text", CLIPTextLoss(clip, "a king"))
    table = table_of(make(classes, texts, methods=["none"]))
    of_classes, of_texts = row(table, "class"), row(table, "a text")
    assert of_classes["none"] is not None
    assert of_classes["none_clip_similarity"] is None
    assert of_texts["none"] is None
    assert -1 <= of_texts["none_clip_similarity"] <= 1
    assert table.summary["a_text_none"].value == of_texts["none_clip_similarity"]
    assert table.summary["a_text_none"].kind == "similarity"
    with pytest.raises(UserError, match=r"row 'class'.*accuracy and clip_similarity"):
        make(classes, case("class", CLIPTextLoss(clip, "a king")))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": []}, "methods"),
        ({"methods": ["none", "none"]}, "methods"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_impossible_settings_are_refused(make, options, words):
    with pytest.raises(UserError, match=words):
        make(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": []}, "row 'r' has none of prompts, for_each and images"),
        ({"for_each": {"wizard": "a king"}}, "row 'r' has prompts and for_each"),
        ({"candidates": 0}, "candidates"),
    ],
)
def test_impossible_cases_are_refused(options, words, judge):
    with pytest.raises(UserError, match=words):
        case("r", ClassifierLoss(judge, "wizard"), **options)


@pytest.mark.parametrize("options", [{"random_share": 0.0}, {"random_share": 1.5}, {"angle": 0.0}, {"angle": 2.0}])
def test_impossible_searches_are_refused(options):
    with pytest.raises(UserError, match=f"search.{next(iter(options))}"):
        LocalSearch(**options)


def test_cases_that_cannot_be_optimised_are_refused(make, judge):
    wizard = ClassifierLoss(judge, "wizard")
    with pytest.raises(UserError, match=r"row 'r'.*from_timestep 600"):
        make(case("r", wizard, optimisation=LatentOptimisation(from_timestep=600)))
    with pytest.raises(UserError, match=r"one_step.*row 'r'.*ComposableGuidance"):
        make(case("r", wizard, sampling=Sampling(steps=STEPS, guidance=ComposableGuidance([3.0]))))
    with pytest.raises(UserError, match="row 'r'"):
        make(case("r", ClassifierLoss(judge)))
    with pytest.raises(UserError, match="images"):
        Realism(judge=judge, reference="any", images=1)


def test_a_judge_guides_nothing(make, tiny_models, judge):
    guide = ClassifierLoss(str(tiny_models / "guide"), "wizard")
    for model, fails in ((str(tiny_models / "guide"), True), (judge, False)):
        guided = case("class", ClassifierLoss(model, "wizard"), objective=guide)
        if fails:
            with pytest.raises(UserError, match=r"row 'class'.*judge.*guide"):
                make(guided)
        else:
            make(guided)


def test_no_case_is_refused(backbone):
    with pytest.raises(UserError, match=r"model\.cases"):
        DoodlEvaluation(backbone, [])


def test_the_table_is_written_by_the_command(tiny_models, judge, tmp_path, capsys):
    guide = {"class_path": "ClassifierLoss", "init_args": {"classifier": str(tiny_models / "guide")}}
    written = {
        "row": "wizards",
        "objective": [guide],
        "judge": {"class_path": "ClassifierLoss", "init_args": {"classifier": judge}},
        "for_each": {"wizard": "a wizard"},
        "seeds": [1, 2],
        "sampling": {"steps": STEPS},
        "optimisation": {"steps": 1},
        "candidates": 2,
    }
    backbone = {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_models / "pipeline")}}
    settings = {
        "model": {"class_path": "DoodlEvaluation", "init_args": {"backbone": backbone, "cases": [written]}},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
        "output_dir": str(tmp_path / "run"),
    }
    config = tmp_path / "doodl_test.yaml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    main(["test", "--config", str(config)])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary.keys() == {f"wizards_{method}" for method in get_args(DoodlMethod) if method != "text_as_prompt"}
    with (tmp_path / "run" / "table.csv").open(newline="") as file:
        (cells,) = csv.DictReader(file)
    assert (cells["guidance"], cells["doodl_images"]) == ("wizards", "2")
    for name in ("table.png", "wizards.png", "records.csv"):
        assert (tmp_path / "run" / name).is_file()
    assert "wizards_doodl" in capsys.readouterr().out
