import csv
import dataclasses
import json

import datasets
import lightning as L
import pytest
import torch
from PIL import Image

from tokenlearn.data import PromptDataModule
from tokenlearn.data.batches import PromptBatch
from tokenlearn.errors import UserError
from tokenlearn.evaluation import ClassTokenEvaluation, evaluation_of
from tokenlearn.evaluation.class_accuracy import _equal_parts
from tokenlearn.evaluation.real_images import RealImages
from tokenlearn.generation import Generate
from tokenlearn.losses.objective import Objective
from tokenlearn.main import main
from tokenlearn.metrics import coverage, expected_coverage, kernel_distance, relative_diversity
from tokenlearn.models import StableDiffusion
from tokenlearn.objectives import ClassifierLoss
from tokenlearn.pipeline import Sampling
from tokenlearn.tokens import load_embedding, save_embedding
from tokenlearn.training import ClassTokens, class_tokens


class Brightness(Objective):
    """A judge whose score is the mean of all pixels."""

    score_name = "brightness"

    def loss(self, images, targets=None):
        return -images.mean(dim=(1, 2, 3))


@pytest.fixture
def backbone(tiny_models):
    return StableDiffusion(str(tiny_models / "pipeline"))


@pytest.fixture
def make(backbone, tiny_models):
    def task(**options):
        settings = {"judge": ClassifierLoss(str(tiny_models / "judge")), "sampling": Sampling(steps=3)}
        return ClassTokens(
            backbone,
            {"wizard": "man with a hat", "pirate": None},
            ClassifierLoss(str(tiny_models / "guide")),
            **(settings | options),
        )

    return task


@pytest.fixture
def real(tmp_path, monkeypatch):
    """Eight images of each class, and one of another."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(0)
    for name, count in (("wizard", 8), ("pirate", 8), ("clown", 1)):
        (tmp_path / "real" / name).mkdir(parents=True)
        for index in range(count):
            pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "real" / name / f"{index}.png")
    return RealImages(source=str(tmp_path / "real"), column="label", images=7)


@pytest.fixture
def other_tokens(tmp_path):
    """A folder of tokens of both classes, and how many there are to write."""

    def write(*names, folder="other"):
        generator = torch.Generator().manual_seed(1)
        for name in names:
            vectors = [torch.randn(1, 16, generator=generator)]
            about = {"class": name, "prompt": f"<{name}> {name}"}
            save_embedding(tmp_path / folder / f"{name}.safetensors", f"<{name}>", vectors, about)
        return str(tmp_path / folder)

    return write


def table_of(task, evaluation=None, **data):
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    evaluation = evaluation_of(task, evaluation)
    assert isinstance(evaluation, ClassTokenEvaluation)
    trainer.test(evaluation, datamodule=PromptDataModule(["a photo of a {}", "a {}"], **data), verbose=False)
    return evaluation.table


def test_the_judge_counts_images_of_each_kind_of_prompt(make, tiny_models):
    task = make()
    table = table_of(task, test_images=3, eval_batch_size=2)
    cells = {row.name: row.cells for row in table.rows}
    assert [cells["wizard"][kind].images for kind in ("name", "described", "token")] == [3, 3, 3]
    assert [cells["pirate"][kind].images for kind in ("name", "described", "token")] == [3, 0, 3]
    seeds = sorted({record.seed for record in table.records})
    assert len(seeds) == 3
    prompts = [f"{template} <wizard> wizard" for template in ("a photo of a", "a", "a photo of a")]
    with torch.no_grad():
        images = task.pipeline.generate(prompts, seeds).clamp(0, 1)
    expected = ClassifierLoss(str(tiny_models / "judge"), "wizard").score(images).mean()
    assert cells["wizard"]["token"].value == pytest.approx(expected.item())
    summary = {name: figure.value for name, figure in table.summary.items()}
    kinds = ["name", "described", "start", "token"]
    assert list(summary) == [f"mean_accuracy_{kind}" for kind in kinds]
    assert summary["mean_accuracy_start"] == summary["mean_accuracy_token"]  # nothing is learned yet
    mean = (cells["wizard"]["token"].value + cells["pirate"]["token"].value) / 2
    assert summary["mean_accuracy_token"] == pytest.approx(mean)
    assert table.fit_summary["judged_accuracy_after"].value == pytest.approx(mean)
    assert task.judged_accuracies == {
        f"<{name}>": pytest.approx(cells[name]["token"].value) for name in ("wizard", "pirate")
    }
    captions = ["wizard: before", "wizard: after", "pirate: before", "pirate: after"]
    assert [caption for caption, _ in table.images["before_after"]] == captions


def test_kinds_that_were_not_evaluated_have_no_figure(make):
    table = table_of(make(), test_images=1, test_kinds=["token"])
    assert list(table.summary) == ["mean_accuracy_token"]
    assert [column.name for column in table.columns if column.printed] == ["token"]
    assert list(table.fit_summary) == ["judged_accuracy_after"]


def test_the_token_at_step_0_is_the_words_that_it_started_from(make):
    task = make()
    evaluation = evaluation_of(task)
    batch = PromptBatch(["a {}"] * 3, [0] * 3, [0, 1, 1], ["start", "start", "name"])
    assert evaluation.prompts(batch) == ["a a wizard", "a a pirate", "a pirate"]
    task.started_from["pirate"] = "hat"
    assert evaluation.prompts(batch)[1] == "a hat pirate"


def test_the_best_word_is_searched_for_or_given(make, monkeypatch):
    found = {"wizard": "hat", "pirate": "man"}
    asked = []
    monkeypatch.setattr(class_tokens, "find_words", lambda *args, **options: asked.append(args[2]) or found)
    table = table_of(make(), test_images=1, test_kinds=["word"])
    assert asked == [["wizard", "pirate"]]  # once, for all batches
    assert list(table.summary) == ["mean_accuracy_word"]
    given = ClassTokenEvaluation({"wizard": "beard"}).of(make())
    batch = PromptBatch(["a {}"], [0], [0], ["word"])
    assert given.prompts(batch) == ["a beard wizard"]
    with pytest.raises(UserError, match=r"evaluation\.words.*'pirate'.*wizard"):
        given.prompts(PromptBatch(["a {}"], [0], [1], ["word"]))


def test_variety_is_that_of_the_judges_features_beside_real_images(make, real, tiny_models):
    task = make()
    settings = {"test_images": 4, "test_kinds": ["name", "token"], "eval_batch_size": 3}
    table = table_of(task, ClassTokenEvaluation(real=real), **settings)
    (row,) = (row for row in table.rows if row.name == "pirate")
    seeds = sorted({record.seed for record in table.records if record.measure == "accuracy"})
    with torch.no_grad():
        images = task.pipeline.generate([f"{start} pirate" for start in ("a photo of a", "a") * 2], seeds).clamp(0, 1)
        features = ClassifierLoss(str(tiny_models / "judge")).classifier.features
        pixels = real.of_classes(["pirate"], 16)["pirate"].movedim(-1, 1) / 255
        found, reference = features(images), features(pixels)
    assert len(reference) == 7
    assert row.cells["name_diversity"].value == pytest.approx(relative_diversity(found, reference).item(), rel=1e-4)
    assert row.cells["name_coverage"].value == pytest.approx(coverage(found, reference).item())
    assert row.cells["described_coverage"].value is None
    expected = [
        f"mean_{measure}_{kind}"
        for measure in ("accuracy", "diversity", "coverage", "realism_distance")
        for kind in settings["test_kinds"]
    ]
    assert list(table.summary) == [*expected, "realism_distance_name", "realism_distance_token"]
    distance = kernel_distance(found, reference).item()
    assert row.cells["name_realism_distance"].value == pytest.approx(distance, rel=1e-4)
    diversities = [row.cells["token_diversity"].value for row in table.rows]
    assert table.summary["mean_diversity_token"].value == pytest.approx(sum(diversities) / 2)
    assert table.notes[0].startswith(
        f"as many images of the distribution of the real ones would cover {expected_coverage(4, 7):.1%}"
    )
    assert [column.name for column in table.columns if column.printed] == ["name", "token"]
    header = [name for column in table.columns for name in column.header]
    assert {"name_diversity", "token_coverage"} <= set(header)


def test_the_distance_of_all_classes_takes_as_many_images_of_each(make, real, tiny_models):
    few = dataclasses.replace(real, images=8)
    task = make()
    table = table_of(task, ClassTokenEvaluation(real=few), test_images=3, test_kinds=["described", "token"])
    seeds = sorted({record.seed for record in table.records if record.measure == "accuracy"})
    with torch.no_grad():
        features = ClassifierLoss(str(tiny_models / "judge")).classifier.features
        prompts = {name: [f"a photo of a <{name}> {name}", f"a <{name}> {name}"] for name in ("wizard", "pirate")}
        found = [features(task.pipeline.generate([*both, both[0]], seeds).clamp(0, 1)) for both in prompts.values()]
        pixels = few.of_classes(["wizard", "pirate"], 16)
        reference = [features(of_class.movedim(-1, 1) / 255) for of_class in pixels.values()]
    together = kernel_distance(torch.cat(found), torch.cat(reference)).item()
    assert table.summary["realism_distance_token"].value == pytest.approx(together, rel=1e-4)
    # Only the wizard has a description, so its images are compared with real wizards alone.
    (wizard,) = (row for row in table.rows if row.name == "wizard")
    alone = wizard.cells["described_realism_distance"].value
    assert table.summary["realism_distance_described"].value == pytest.approx(alone)


def test_equal_parts_are_the_first_rows_of_each():
    parts = [torch.arange(5)[:, None], 10 + torch.arange(3)[:, None]]
    assert _equal_parts(parts).flatten().tolist() == [0, 1, 2, 10, 11, 12]


def test_without_real_images_there_are_no_columns_of_variety(make):
    table = table_of(make(), test_images=2, test_kinds=["token"])
    assert not [column.name for column in table.columns if column.measure != "accuracy"]
    assert not table.notes


def test_one_image_of_a_kind_has_no_diversity(make, real):
    table = table_of(make(), ClassTokenEvaluation(real=real), test_images=1, test_kinds=["token"])
    assert list(table.summary) == ["mean_accuracy_token", "mean_coverage_token"]


def test_tokens_of_another_training_are_a_further_column(make, other_tokens, real, tiny_models):
    evaluation = ClassTokenEvaluation(embeddings={"from_best_word": other_tokens("wizard", "pirate")}, real=real)
    task = make()
    own = {name: task.bank.get(name)[0].clone() for name in task.bank.placeholders}
    table = table_of(task, evaluation, test_images=3, test_kinds=["name", "token"], eval_batch_size=4)
    assert [column.name for column in table.columns if column.printed] == ["name", "token", "from_best_word"]
    assert {f"mean_{measure}_from_best_word" for measure in ("accuracy", "diversity", "coverage")} <= set(
        table.summary
    )
    seeds = {
        method: [r.seed for r in table.records if (r.method, r.item) == (method, "wizard") and r.measure == "accuracy"]
        for method in ("token", "from_best_word")
    }
    assert seeds["token"] == seeds["from_best_word"]
    assert len(seeds["token"]) == 3
    pipeline = task.pipeline.with_tokens(other_tokens("wizard", "pirate"))
    prompts = [f"{start} <wizard> wizard" for start in ("a photo of a", "a", "a photo of a")]
    with torch.no_grad():
        images = pipeline.generate(prompts, seeds["token"]).clamp(0, 1)
        features = ClassifierLoss(str(tiny_models / "judge")).classifier.features
        pixels = real.of_classes(["wizard"], 16)["wizard"].movedim(-1, 1) / 255
        expected = relative_diversity(features(images), features(pixels)).item()
    wizard = table.rows[0].cells
    assert wizard["from_best_word_diversity"].value == pytest.approx(expected, rel=1e-4)
    assert wizard["from_best_word_diversity"].value != wizard["token_diversity"].value
    assert all(torch.equal(task.bank.get(name)[0], vectors) for name, vectors in own.items())


def test_what_the_table_cannot_be_made_of_is_refused_in_one_line(make, other_tokens, real, tmp_path):
    data = {"test_images": 1, "test_kinds": ["token"]}
    with pytest.raises(UserError, match=r"evaluation\.embeddings has 'word'.*another name"):
        ClassTokenEvaluation(embeddings={"word": "tokens"})
    with pytest.raises(UserError, match=r"embeddings\.other has no token of class 'pirate', only of wizard"):
        table_of(make(), ClassTokenEvaluation(embeddings={"other": other_tokens("wizard")}), **data)
    with pytest.raises(UserError, match=r"real\.images is 5.*6 or more"):
        ClassTokenEvaluation(real=RealImages(source=real.source, column="label", images=5))
    with pytest.raises(UserError, match=r"model\.judge is a Brightness"):
        table_of(make(judge=Brightness()), ClassTokenEvaluation(real=real), **data)
    (tmp_path / "real" / "pirate" / "0.png").unlink()
    few = RealImages(source=real.source, column="label", images=100)
    for index in range(1, 4):
        (tmp_path / "real" / "pirate" / f"{index}.png").unlink()
    with pytest.raises(UserError, match=r"4 usable images of class 'pirate', and 6 are needed"):
        table_of(make(), ClassTokenEvaluation(real=few), **data)


def test_a_judge_may_have_another_score(make):
    table = table_of(make(judge=Brightness()), test_images=2)
    cell = table.rows[0].cells["token"]
    assert 0 < cell.value < 1
    assert (cell.low, cell.images) == (None, 2)
    assert list(table.summary)[-1] == "mean_brightness_token"
    assert table.summary["mean_brightness_token"].kind == "score"


def test_a_judge_is_needed(make):
    task = make(judge=None)
    assert not evaluation_of(task).evaluate_after_fit
    assert evaluation_of(make()).evaluate_after_fit
    with pytest.raises(UserError, match=r"model\.judge"):
        table_of(task)


def test_tasks_without_an_evaluation_are_named(backbone, make):
    with pytest.raises(UserError, match=r"Generate.*ClassTokens, Caso"):
        evaluation_of(Generate(backbone))
    with pytest.raises(UserError, match=r"ClassTokenEvaluation.*Generate"):
        evaluation_of(Generate(backbone), ClassTokenEvaluation())


def test_the_evaluation_follows_a_fit_and_loads_its_checkpoint(tiny_config, tmp_path):
    main(["fit", "--config", tiny_config({"trainer.max_steps": 2})])
    run = tmp_path / "run"
    after_fit = json.loads((run / "summary.json").read_text())
    accuracies = {}
    for name in ("wizard", "pirate"):
        about = load_embedding(run / "embeddings" / f"{name}-tl.safetensors").metadata
        accuracies[name] = float(about["judged_accuracy"])
    (best,) = (run / "checkpoints").glob("best-*.ckpt")
    again = tiny_config({"output_dir": str(tmp_path / "again")}, "again")
    main(["test", "--config", again, "--ckpt_path", str(best)])
    summary = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert summary == {name: after_fit[name] for name in summary}
    with (tmp_path / "again" / "table.csv").open() as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert {name: float(row["token"]) for name, row in rows.items()} == accuracies
