"""Photos that cannot be read are left out of evaluations and of sets of real images, with one warning that counts."""

import warnings

import datasets
import lightning as L
import lightning_utilities.core.rank_zero as ranks
import pytest
from PIL import Image

from tokenlearn.data.images_to_edit import FolderImages
from tokenlearn.data.pixels import readable_squares
from tokenlearn.diffusion.latent_optimisation import LatentOptimisation
from tokenlearn.errors import UserError
from tokenlearn.evaluation.doodl import DoodlEvaluation, Realism
from tokenlearn.evaluation.doodl_cases import DoodlCase
from tokenlearn.evaluation.real_images import RealImages
from tokenlearn.models import StableDiffusion
from tokenlearn.objectives import ClassifierLoss, SymmetryLoss
from tokenlearn.pipeline import Sampling


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
