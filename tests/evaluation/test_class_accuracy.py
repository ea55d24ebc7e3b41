import csv
import json

import lightning as L
import pytest
import torch

from tokenlearn.data import PromptDataModule
from tokenlearn.data.batches import PromptBatch
from tokenlearn.errors import UserError
from tokenlearn.evaluation import ClassTokenEvaluation, evaluation_of
from tokenlearn.generation import Generate
from tokenlearn.losses.objective import Objective
from tokenlearn.main import main
from tokenlearn.models import StableDiffusion
from tokenlearn.objectives import ClassifierLoss
from tokenlearn.pipeline import Sampling
from tokenlearn.tokens import load_embedding
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


def table_of(task, **data):
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    evaluation = evaluation_of(task)
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
        about = load_embedding(run / "embeddings" / f"{name}.safetensors").metadata
        accuracies[name] = float(about["judged_accuracy"])
    (best,) = (run / "checkpoints").glob("best-*.ckpt")
    again = tiny_config({"output_dir": str(tmp_path / "again")}, "again")
    main(["test", "--config", again, "--ckpt_path", str(best)])
    summary = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert summary == {name: after_fit[name] for name in summary}
    with (tmp_path / "again" / "table.csv").open() as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert {name: float(row["token"]) for name, row in rows.items()} == accuracies
