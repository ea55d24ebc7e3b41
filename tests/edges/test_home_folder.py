"""``~`` is the home folder in every setting that names a file or a folder, and nothing is not the current one."""

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image

from tests.data.stand_ins import ImageTask, trainer_with
from tests.edges.test_foreign_origins import WHOLE, image_with
from tests.tiny import tiny_classifier
from tests.tiny_clip import tiny_aesthetic_head, tiny_clip
from tokenlearn.conversion import convert
from tokenlearn.data import HeldOut, ImageDataModule
from tokenlearn.data.images_to_edit import FolderImages
from tokenlearn.data.latent_cache import LatentCache, LatentCaching
from tokenlearn.errors import UserError
from tokenlearn.export import export
from tokenlearn.main import main
from tokenlearn.models import StableDiffusion
from tokenlearn.models.aesthetic import AestheticHead
from tokenlearn.models.classifier import TimmClassifier
from tokenlearn.models.clip import ClipModel
from tokenlearn.objectives import CLIPImageLoss
from tokenlearn.objectives.judges import is_same_model
from tokenlearn.paths import resolve_config
from tokenlearn.pipeline import Pipeline, Sampling
from tokenlearn.provenance import read_origin
from tokenlearn.run_checks import checkpoint_path
from tokenlearn.tokens import load_bank, load_embedding, save_embedding
from tokenlearn.training import ClassTokens


@pytest.fixture(scope="module")
def filled(tmp_path_factory, tiny_models):
    """A folder of everything that a setting can name."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_models / "pipeline", home / "pipeline")
    tiny_classifier(home / "guide", ["a", "b"])
    tiny_clip(home / "clip")
    tiny_aesthetic_head(home / "head", str(home / "clip"))
    save_embedding(home / "tokens" / "smile.safetensors", "<smile>", [torch.full((1, 16), 0.1)], {})
    (home / "photos").mkdir()
    for index in range(2):
        Image.new("RGB", (24, 20), (90, 100, 60 * index)).save(home / "photos" / f"{index}.png")
    image_with(json.dumps(WHOLE), home / "made.png")
    (home / "config.yaml").write_text("model: Generate")
    about = {"base_model": "x", "vocabulary_hash": "y", "num_vectors": {"<a>": 1}, "embedding_widths": [16]}
    checkpoint = {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {"bank.vectors.0": torch.zeros(1, 16), "bank._extra_state": {"<a>": 1}},
        "tokenlearn": about | {"metadata": {"<a>": {}}},
    }
    torch.save(checkpoint, home / "last.ckpt")
    return home


@pytest.fixture
def home(filled, tmp_path, monkeypatch):
    """The home folder; nothing may be written to a folder named ``~`` in the current one."""
    monkeypatch.setenv("HOME", str(filled))
    monkeypatch.chdir(tmp_path)
    yield filled
    assert not (tmp_path / "~").exists()


def data_of(source):
    data = ImageDataModule(source, held_out=HeldOut(0, 0), num_workers=0, batch_size=1)
    data.trainer = trainer_with(ImageTask())
    data.prepare_data()
    data.setup("fit")
    return [batch.names for batch in data._evaluation(data._ready()[0].train)]


READERS = {
    "a backbone": lambda: StableDiffusion("~/pipeline"),
    "a pipeline": lambda: Pipeline.from_pretrained("~/pipeline", tokens="~/tokens/smile.safetensors"),
    "a classifier": lambda: TimmClassifier("~/guide"),
    "a classifier of timm's name": lambda: TimmClassifier("local-dir:~/guide"),
    "a CLIP": lambda: ClipModel("~/clip"),
    "an aesthetic head": lambda: AestheticHead("~/head"),
    "examples": lambda: CLIPImageLoss("~/clip", ["~/photos/0.png"]),
    "an embedding file": lambda: load_embedding("~/tokens/smile.safetensors"),
    "embedding files": lambda: load_bank(["~/tokens/smile.safetensors"], [16]),
    "a folder of embedding files": lambda: load_bank("~/tokens", [16]),
    "named embedding files": lambda: load_bank({"<b>": "~/tokens/smile.safetensors"}, [16]),
    "a folder of images": lambda: FolderImages("~/photos", 16, 4)[0],
    "an image": lambda: FolderImages("~/photos/1.png", 16, 4)[0],
    "an image that says how it was made": lambda: read_origin("~/made.png"),
    "a config": lambda: resolve_config("~/config.yaml"),
    "a checkpoint": lambda: checkpoint_path("~/last.ckpt", ClassTokens, resumes=False),
    "an image to edit": lambda: Pipeline(StableDiffusion("~/pipeline"), sampling=Sampling(steps=2)).edit(
        "~/photos/0.png", {}, steps=2, timestep=1
    ),
}


@pytest.mark.parametrize("name", list(READERS))
def test_what_is_read(home, name):
    READERS[name]()


def test_images_to_learn_from(home):
    assert data_of("~/photos") == [["0.png"], ["1.png"]]


def test_a_folder_where_an_image_is_expected(home):
    with pytest.raises(UserError, match="'~/photos' is a folder"):
        Pipeline(StableDiffusion("~/pipeline")).edit("~/photos", {})


EMPTY = {
    "a backbone": StableDiffusion,
    "a pipeline": Pipeline.from_pretrained,
    "a classifier": TimmClassifier,
    "a CLIP": ClipModel,
    "an aesthetic head": AestheticHead,
    "images": lambda path: FolderImages(path, 16, 4),
    "images to learn from": data_of,
    "embedding files": lambda path: load_bank([path], [16]),
    "a config": resolve_config,
    "a checkpoint": lambda path: checkpoint_path(path, ClassTokens, resumes=False),
    "an image that says how it was made": read_origin,
}


@pytest.mark.parametrize("path", ["", " "])
@pytest.mark.parametrize("name", list(EMPTY))
def test_no_path_is_not_the_current_folder(home, tmp_path, name, path):
    Image.new("RGB", (24, 20)).save(tmp_path / "a.png")
    with pytest.raises(UserError) as caught:
        EMPTY[name](path)
    assert ";" in str(caught.value)
    assert len(str(caught.value)) < 200


def test_the_same_model_in_two_spellings(home):
    assert is_same_model("~/guide", str(home / "guide"))


def test_what_is_written(home):
    assert export(ckpt_path="~/last.ckpt", output_dir="~/exported") == [home / "exported" / "a-tl.safetensors"]
    assert convert(["~/tokens"], output_dir="~/converted") == [home / "converted" / "smile-tl.safetensors"]
    cache = LatentCache(LatentCaching("~/latents"), {"a": 1})
    assert cache.folder.parent == home / "latents"


def test_folders_of_a_run(home):
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "~/log", "name": "x"}}
    config = {
        "model": {
            "class_path": "Generate",
            "init_args": {
                "backbone": {"class_path": "StableDiffusion", "init_args": {"pretrained": "~/pipeline"}},
                "embeddings": "~/tokens",
                "sampling": {"steps": 1},
            },
        },
        "data": {"class_path": "PromptList", "init_args": {"prompts": ["a <smile>"], "seeds": [0]}},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": [logger]},
        "output_dir": "~/run",
    }
    (home / "mine.yaml").write_text(yaml.safe_dump(config))
    profiler = ["--trainer.profiler=SimpleProfiler", "--trainer.profiler.dirpath=~/times"]
    main(["predict", "--config", "~/mine.yaml", *profiler, "--trainer.profiler.filename=a"])
    assert (home / "run" / "contact_sheet.png").is_file()
    assert list((home / "times").iterdir())
