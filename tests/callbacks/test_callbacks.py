"""Callbacks in real runs of a task that learns a token of four numbers."""

import math

import lightning as L
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tokenlearn.callbacks import EmbeddingExport, ImageGrid, LearningCurve, PredictionWriter
from tokenlearn.data import PromptList
from tokenlearn.data.interfaces import TaskWrapper
from tokenlearn.errors import UserError
from tokenlearn.generation.results import GeneratedBatch
from tokenlearn.token_task import TokenTask
from tokenlearn.tokens import TokenBank


class CountingTask(TokenTask):
    """Its token's first number is the number of steps; validations log the given values."""

    def __init__(self, values):
        L.LightningModule.__init__(self)
        self.bank = TokenBank({"<wizard>": 1}, [4])
        self.values = iter(values)
        self.judged = {}

    def token_metadata(self):
        return {"<wizard>": dict(self.judged)}

    def training_step(self, batch):
        return -self.bank.vectors[0][0, 0]

    def configure_optimizers(self):
        return torch.optim.SGD(self.bank.parameters(), lr=1.0)

    def validation_step(self, batch):
        images = torch.full((3, 3, 8, 8), self.global_step / 10)
        return {"images": images, "rows": ["wizard", "pirate", "wizard"]}

    def on_validation_epoch_end(self):
        self.log("val/guided_accuracy", next(self.values))

    def test_step(self, batch):
        self.judged = {"judged_accuracy": "0.5000"}

    def predict_step(self, batch):
        images = torch.stack([torch.full((3, 8, 8), seed / 10) for seed in batch.seeds])
        return GeneratedBatch(images, batch.templates, batch.seeds, batch.class_indices)


def trainer(folder, *callbacks, epochs=1, **options):
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        }
        | options,
    )


def fit(folder, values, *callbacks, **options):
    task = CountingTask(values)
    run = trainer(folder, *callbacks, epochs=len(values), **options)
    run.fit(task, range(1), range(1))
    return run, task


def exported(folder):
    """First number of the exported token, and the file's metadata."""
    with safe_open(folder / "embeddings" / "wizard-tl.safetensors", "pt") as file:
        (key,) = file.keys()
        return file.get_tensor(key)[0, 0].item(), file.metadata()


@pytest.mark.parametrize(
    ("mode", "values", "best_step"),
    [
        ("max", [0.2, 0.6, 0.6, 0.4], 2),
        ("min", [0.4, 0.3, 0.1, 0.1], 3),
        ("max", [math.nan, 0.3, math.nan, 0.1], 2),
    ],
)
def test_embedding_export_keeps_the_best(tmp_path, monkeypatch, mode, values, best_step):
    monkeypatch.setattr(CountingTask, "monitor", ("val/guided_accuracy", mode))
    export = EmbeddingExport()
    fit(tmp_path, values, export)
    number, metadata = exported(tmp_path)
    assert number == best_step
    assert metadata["step"] == str(best_step)
    assert export.best == pytest.approx(values[best_step - 1])
    assert sorted(path.name for path in (tmp_path / "embeddings").iterdir()) == [
        "wizard-tl.json",
        "wizard-tl.safetensors",
    ]


def test_embedding_export_ignores_sanity_checks_and_other_runs(tmp_path):
    export = EmbeddingExport()
    task = CountingTask([0.9, 0.5])
    trainer(tmp_path, export, num_sanity_val_steps=1).fit(task, range(1), range(1))
    assert export.best == pytest.approx(0.5)
    alone = EmbeddingExport()
    other = trainer(tmp_path / "other", alone)
    other.validate(CountingTask([0.9]), range(1), verbose=False)
    other.test(CountingTask([]), range(1), verbose=False)
    assert alone.best is None
    assert not (tmp_path / "other" / "embeddings").exists()


@pytest.mark.parametrize(
    ("state", "exports"),
    [
        ({"best": 0.7, "monitor": "val/guided_accuracy"}, False),
        ({"best": 0.7}, False),  # of a checkpoint before figures were named, all of which were accuracies
        ({"best": 0.7, "monitor": "val/loss"}, True),
    ],
)
def test_a_best_value_of_another_figure_is_forgotten(tmp_path, state, exports):
    resumed = EmbeddingExport()
    resumed.load_state_dict(state)
    fit(tmp_path, [0.6], resumed)
    assert (tmp_path / "embeddings").exists() is exports
    assert resumed.best == pytest.approx(0.6 if exports else 0.7)


def test_embedding_export_resumes_with_its_best_and_still_leaves_files(tmp_path):
    first = EmbeddingExport()
    fit(tmp_path / "first", [0.7], first)
    resumed = EmbeddingExport()
    resumed.load_state_dict(first.state_dict())
    run, task = fit(tmp_path / "second", [0.6], resumed)
    assert not (tmp_path / "second" / "embeddings").exists()
    run.test(task, range(1), verbose=False)
    number, metadata = exported(tmp_path / "second")
    assert number == 1
    assert metadata["judged_accuracy"] == "0.5000"
    assert resumed.paths == [tmp_path / "second" / "embeddings" / "wizard-tl.safetensors"]


class Evaluation(L.LightningModule, TaskWrapper):
    """An evaluation that tells its task what it found."""

    def __init__(self, task):
        super().__init__()
        self.task = [task]  # not a submodule

    def wrapped_task(self):
        return self.task[0]

    def test_step(self, batch):
        self.wrapped_task().judged = {"judged_accuracy": "0.7500"}


def test_embedding_export_after_an_evaluation_of_the_fit(tmp_path):
    export = EmbeddingExport()
    run, task = fit(tmp_path, [0.6], export)
    run.test(Evaluation(task), range(1), verbose=False)
    number, metadata = exported(tmp_path)
    assert number == 1
    assert metadata["judged_accuracy"] == "0.7500"


def test_embedding_export_names_a_metric_that_is_not_logged(tmp_path):
    with pytest.raises(UserError, match=r"'val/acuracy'.* val/guided_accuracy"):
        fit(tmp_path, [0.5], EmbeddingExport(monitor="val/acuracy"))


def test_image_grid_writes_a_sheet_per_validation(tmp_path):
    logger = L.pytorch.loggers.TensorBoardLogger(tmp_path, name="", version="")
    fit(tmp_path, [0.1, 0.2, 0.3], ImageGrid(columns=1, every_n_validations=2), logger=logger)
    sheets = sorted((tmp_path / "validation").iterdir())
    assert [path.name for path in sheets] == ["step-000001.png", "step-000003.png"]
    for path, step in zip(sheets, (1, 3), strict=True):
        with Image.open(path) as image:
            assert image.height == 2 * (96 + 4) + 4  # a row per class
            assert image.getpixel((image.width - 50, 50)) == (round(255 * step / 10),) * 3
            margin = image.width - (96 + 4)
            assert image.getpixel((margin - 1, 50)) == (255, 255, 255)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Images("validation")] == [1, 3]


def test_image_grid_of_a_validation_apart_from_a_fit(tmp_path):
    trainer(tmp_path, ImageGrid()).validate(CountingTask([0.1]), range(1), verbose=False)
    assert [path.name for path in (tmp_path / "validation").iterdir()] == ["final.png"]


def test_image_grid_ignores_sanity_checks(tmp_path):
    trainer(tmp_path, ImageGrid(), num_sanity_val_steps=1, max_steps=0).fit(CountingTask([0.1]), range(1), range(1))
    assert not (tmp_path / "validation").exists()


def test_prediction_writer(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / ".000-a-seed1-0123456789ab.png").write_bytes(b"of a killed process")
    prompts = ["A <wizard> wizard, smiling!", "…"]
    run = trainer(tmp_path, PredictionWriter(columns=2))
    run.predict(CountingTask([]), datamodule=PromptList(prompts, [10, 2, 1], batch_size=4), return_predictions=False)
    names = {path.name for path in (tmp_path / "images").glob("[!.]*")}
    stems = ("000-a-wizard-wizard-smiling", "001-")
    assert names == {f"{stem}-seed{seed}.png" for stem in stems for seed in (10, 2, 1)}
    with Image.open(tmp_path / "images" / "001--seed2.png") as image:
        assert image.getpixel((0, 0)) == (51, 51, 51)
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.height == 2 * (96 + 4) + 4
        places = [sheet.width - 150, sheet.width - 50]
        shown = [[sheet.getpixel((x, y))[0] for x in places] for y in (50, 150)]
    assert shown == [[26, 51]] * 2  # two columns, by seed


def test_prediction_writer_agrees_on_the_folder_before_any_batch(tmp_path, monkeypatch):
    run = trainer(tmp_path, PredictionWriter())
    calls = []

    def broadcast(folder, src=0):
        calls.append(folder)
        assert not run.predict_loop.batch_progress.current.ready  # processes may have different numbers of batches
        return str(tmp_path / "of-the-first-process")

    monkeypatch.setattr(run.strategy, "broadcast", broadcast)
    run.predict(CountingTask([]), datamodule=PromptList(["a"], [1, 2, 3], batch_size=1), return_predictions=False)
    assert str(tmp_path) in calls
    assert len(list((tmp_path / "of-the-first-process" / "images").iterdir())) == 3
    assert (tmp_path / "of-the-first-process" / "contact_sheet.png").is_file()


def test_the_learning_curve_begins_before_the_first_step(tmp_path, capsys):
    export = EmbeddingExport()
    trainer(tmp_path, LearningCurve(), export, epochs=2).fit(CountingTask([0.5, 0.25, 0.125]), range(2), range(1))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 0", "step 2", "step 4"]
    assert lines[0].endswith("guided_accuracy 0.5")
    assert (exported(tmp_path)[0], export.best) == (0, 0.5)  # tokens that training made worse are not exported


def test_the_learning_curve_may_begin_after_steps(tmp_path, capsys):
    fit(tmp_path, [0.25], LearningCurve(validate_first=False))
    assert capsys.readouterr().out.startswith("step 1: guided_accuracy 0.25")


class NamedTask(CountingTask):
    """A task whose token names its class, as class tokens do."""

    def token_metadata(self):
        return {"<wizard>": {**self.judged, "class": "wizard"}}


@pytest.mark.parametrize("rows", ["wizard", "<wizard>"])
def test_previews_are_of_the_exported_tokens(tmp_path, rows, monkeypatch, capsys):
    monkeypatch.setattr(
        NamedTask,
        "validation_step",
        lambda self, batch: {"images": torch.full((2, 3, 8, 8), self.global_step / 10), "rows": ["image", rows]},
    )
    export = EmbeddingExport()
    run = trainer(tmp_path, export, epochs=3)
    task = NamedTask([0.1, 0.7, 0.3])
    run.fit(task, range(1), range(1))
    run.test(task, range(1), verbose=False)  # exports again, and has no images
    preview = tmp_path / "embeddings" / "wizard-tl.preview.png"
    with Image.open(preview) as image:
        assert image.getpixel((0, 0)) == (51, 51, 51)  # of step 2, the best one
    Image.new("RGB", (4, 4)).save(preview)  # now another image is there
    trainer(tmp_path, EmbeddingExport()).fit(NamedTask([0.9]), range(1), range(1))
    with Image.open(preview) as image:
        assert image.size == (4, 4)
    assert "wizard-tl.preview.png' is no preview of <wizard> by tokenlearn, and was left" in capsys.readouterr().err


def test_a_fit_that_continues_in_a_new_folder_brings_its_previews(tmp_path, monkeypatch):
    monkeypatch.setattr(
        NamedTask,
        "validation_step",
        lambda self, batch: {"images": torch.full((1, 3, 8, 8), self.global_step / 10), "rows": ["wizard"]},
    )
    for hook in ("on_save_checkpoint", "on_load_checkpoint"):  # of the task, which has no model here
        monkeypatch.setattr(NamedTask, hook, lambda self, checkpoint: None)
    first, second = tmp_path / "first", tmp_path / "second"
    run = trainer(first, EmbeddingExport(), epochs=2)
    run.fit(NamedTask([0.1, 0.7]), range(1), range(1))
    run.save_checkpoint(first / "checkpoints" / "last.ckpt")
    (first / "embeddings" / "mine.preview.png").write_bytes(b"an image of the user's")
    continued = trainer(second, EmbeddingExport(), epochs=3)
    task = NamedTask([0.1, 0.7, 0.3])
    continued.fit(task, range(1), range(1), ckpt_path=str(first / "checkpoints" / "last.ckpt"))
    continued.test(task, range(1), verbose=False)
    assert sorted(path.name for path in (second / "embeddings").iterdir()) == [
        "wizard-tl.json",
        "wizard-tl.preview.png",
        "wizard-tl.safetensors",
    ]
    with Image.open(second / "embeddings" / "wizard-tl.preview.png") as image:
        assert image.getpixel((0, 0)) == (51, 51, 51)  # of step 2, the best one


@pytest.mark.parametrize("settings", [{"previews": False}, {"format": "diffusers"}])
def test_no_preview_where_none_is_shown_or_wanted(tmp_path, settings):
    trainer(tmp_path, EmbeddingExport(**settings)).fit(NamedTask([0.9]), range(1), range(1))
    assert list((tmp_path / "embeddings").glob("*.safetensors"))
    assert not list((tmp_path / "embeddings").glob("*.png"))
