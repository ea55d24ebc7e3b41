"""Photos that cannot be read are left out of evaluations and of sets of real images, with one warning that counts."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import datasets
import lightning as L
import lightning_utilities.core.rank_zero as ranks
import pytest
import torch
import yaml
from PIL import Image

from tokenlearn.data.images_to_edit import FolderImages
from tokenlearn.data.pixels import readable_squares
from tokenlearn.data.skipped_images import SkippedImages
from tokenlearn.data.sources import Skipped, items_below
from tokenlearn.data.streams import EvaluationBatches
from tokenlearn.diffusion.latent_optimisation import LatentOptimisation
from tokenlearn.errors import UserError
from tokenlearn.evaluation.doodl import DoodlEvaluation, Realism
from tokenlearn.evaluation.doodl_cases import DoodlCase
from tokenlearn.evaluation.real_images import RealImages
from tokenlearn.models import StableDiffusion
from tokenlearn.objectives import ClassifierLoss, SymmetryLoss
from tokenlearn.pipeline import Sampling
from tokenlearn.token_task import TokenTask
from tokenlearn.tokens import save_embedding


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def photos(tmp_path):
    """Three photos, and three files that are none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in (0, 2, 4):
        Image.new("RGB", (24, 20), (40 * index, 90, 150)).save(folder / f"{index}.png")
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "3.jpg").touch()
    (folder / "5.png").write_text("words")
    return folder


def skipped_in(call):
    """What a call gives, and its warnings of images that are left out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(warning.message) for warning in caught if "skipped" in str(warning.message)]


@pytest.fixture
def evaluate(tiny_models):
    """Evaluate optimised latents of photos, beside a case of a generated image; gives the table."""

    def run(images, size=None, **options):
        judge = ClassifierLoss(str(tiny_models / "judge"), "wizard")
        sampling, optimisation = Sampling(steps=2, guidance=1.0, size=size), LatentOptimisation(steps=1)
        settings = {"objective": SymmetryLoss(), "judge": judge, "optimisation": optimisation, "candidates": 1}
        cases = [
            DoodlCase(row="photos", images=str(images), sampling=sampling, **settings),
            DoodlCase(row="prompts", prompts=["a man"], sampling=Sampling(steps=2), **settings),
        ]
        backbone = StableDiffusion(str(tiny_models / "pipeline"))
        evaluation = DoodlEvaluation(backbone, cases, methods=["none"], **options)
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.test(evaluation, verbose=False)
        return evaluation

    return run


def test_an_evaluation_leaves_out_broken_photos(evaluate, photos):
    evaluation, lines = skipped_in(lambda: evaluate(photos, batch_size=2))
    (line,) = lines
    assert "skipped 3 images that cannot be used, such as '1'" in line
    assert {record.seed for record in evaluation.table.records if record.item == "photos"} == {"0", "2", "4"}


def test_a_case_without_any_usable_photo_leaves_the_others(evaluate, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").touch()
    evaluation, lines = skipped_in(lambda: evaluate(tmp_path / "broken"))
    assert len(lines) == 1
    assert {record.item for record in evaluation.table.records} == {"prompts"}


@pytest.mark.parametrize(("size", "expected"), [(None, (16, 20)), ((32, 32), (32, 38)), ((24, 32), (24, 28))])
def test_photos_of_an_evaluation_have_the_size_of_the_settings(evaluate, photos, size, expected):
    for name in ("1.png", "3.jpg", "5.png"):
        (photos / name).unlink()
    assert tuple(evaluate(photos, size).images[0].images[0].image.shape[-2:]) == expected


def encoded(photos):
    return [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(photos.iterdir())]


def test_real_images_that_can_be_read_take_the_place_of_others(photos):
    squares, (line,) = skipped_in(lambda: readable_squares(iter([*encoded(photos), None]), 8, 2, "photos"))
    assert [tuple(square.shape) for square in squares] == [(8, 8, 3)] * 2
    assert "skipped 1 of the images in 'photos'" in line
    squares, (line,) = skipped_in(lambda: readable_squares([*encoded(photos), None], 8, 9, "photos"))
    assert len(squares) == 3
    assert "skipped 4 of" in line


def test_a_reference_of_broken_images(evaluate, photos, tiny_models, tmp_path):
    reference = Realism(judge=str(tiny_models / "judge"), reference=str(photos), images=3)
    (tmp_path / "one").mkdir()
    Image.new("RGB", (24, 20)).save(tmp_path / "one" / "a.png")
    _, lines = skipped_in(lambda: evaluate(tmp_path / "one", realism=reference))
    assert [line.partition(" of the images")[0] for line in lines] == ["skipped 2"]
    for name in ("2.png", "4.png"):
        (photos / name).write_text("words")
    with pytest.raises(UserError, match="has 1 images that can be used; a distance needs at least 2"):
        evaluate(tmp_path / "one", realism=reference)


def test_real_images_of_classes(photos):
    (photos / "metadata.csv").write_text("file_name,look\n0.png,a\n1.png,a\n2.png,a\n3.jpg,b\n4.png,b\n5.png,b\n")
    images, lines = skipped_in(lambda: RealImages(source=str(photos), column="look", fewest=1).of_classes("ab", 8))
    assert {name: len(found) for name, found in images.items()} == {"a": 2, "b": 1}
    assert len(lines) == 2
    with pytest.raises(UserError, match="has 1 usable images of class 'b', and 2 are needed"):
        RealImages(source=str(photos), column="look").of_classes("ab", 8)


@pytest.mark.parametrize(("rank", "warned"), [(0, 2), (1, 0)])
def test_what_all_processes_see_is_said_by_the_first(photos, monkeypatch, rank, warned):
    monkeypatch.setattr(ranks.rank_zero_only, "rank", rank)
    (photos / "a.heic").touch()
    (photos / "linked").symlink_to(photos, target_is_directory=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FolderImages(str(photos), 16, 4)
    assert len([warning for warning in caught if "left out" in str(warning.message)]) == warned


@pytest.mark.parametrize("stage", ["val", "test", "predict"])
@pytest.mark.parametrize("several", [False, True])
def test_several_processes_warn_once_of_the_images_of_all(monkeypatch, stage, several):
    def load(item):
        return Skipped(f"image {item.index}", "it is cut") if item.index in (2, 3) else item.index

    loaders = [
        EvaluationBatches(lambda: items_below(6), 6, load, list, batch_size=4, rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    batches, lines = skipped_in(lambda: [list(loader) for loader in loaders])
    assert batches == [[[0, 4]], [[1, 5]]]
    assert not lines

    def gather(parts, own):
        parts[:] = [loader.skipped for loader in loaders]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    lines_of_all = []
    for rank, loader in enumerate(loaders):
        found = {f"{name}_dataloaders": None for name in ("val", "test", "predict")}
        found[f"{stage}_dataloaders"] = [loader, []] if several else loader
        trainer = SimpleNamespace(world_size=2, is_global_zero=rank == 0, **found)
        end = {"val": "on_validation_end", "test": "on_test_end", "predict": "on_predict_end"}[stage]
        _, lines = skipped_in(lambda end=end, trainer=trainer: getattr(SkippedImages(), end)(trainer, None))
        lines_of_all += lines
    (line,) = lines_of_all
    assert line.startswith("skipped 2 images that cannot be used, such as 'image 2' (it is cut)")


def test_tasks_and_evaluations_warn_with_any_trainer(tiny_models):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    judge = ClassifierLoss(str(tiny_models / "judge"), "wizard")
    case = DoodlCase(row="a", prompts=["a man"], objective=SymmetryLoss(), judge=judge, sampling=Sampling(steps=2))
    for module in (TokenTask(backbone, Sampling()), DoodlEvaluation(backbone, [case], methods=["none"])):
        assert [type(callback) for callback in module.configure_callbacks()] == [SkippedImages]


def test_two_processes_that_edit_broken_photos(tiny_models, photos, tmp_path):
    save_embedding(tmp_path / "smile.safetensors", "<smile>", [torch.ones(1, 16)], {})
    backbone = {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_models / "pipeline")}}
    settings = {
        "backbone": backbone,
        "images": str(photos),
        "embeddings": str(tmp_path / "smile.safetensors"),
        "edits": [{"<smile>": 2}],
        "editing": {"timestep": 601, "steps": 5},
    }
    config = {
        "model": {"class_path": "Edit", "init_args": settings},
        "trainer": {"accelerator": "cpu", "logger": False, "devices": 2, "strategy": "ddp"},
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "edit.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "tokenlearn", "predict", "--config", str(tmp_path / "edit.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("skipped ") == 1
    assert "skipped 3 images that cannot be used" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").rglob("images/*/*.png")) == ["0.png", "2.png", "4.png"]
