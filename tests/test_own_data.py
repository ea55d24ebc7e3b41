"""The page on one's own photos: its commands, one after the other, at reduced size."""

import re
import shlex
from pathlib import Path

import datasets
import pytest

from tokenlearn.data.portraits import portrait
from tokenlearn.main import main

PAGE = Path(__file__).parents[1] / "docs" / "own_data.md"
CLASSES = {"clown": "clown", "nurse": "nurse", "other": None}
BACKBONE = ["--model.backbone.pretrained=MODEL", "--trainer.enable_progress_bar=false"]
SHORT = [*BACKBONE, "--model.sampling.steps=2", "--trainer.max_steps=1", "--data.batches_per_epoch=1"]
IMAGES = ["--data.held_out.validation=1", "--data.batch_size=2"]
CLASSIFIERS = ["--guide=test_resnet", "--judge=test_vit", "--size=32", "--steps=2", "--pretrained=false"]

REDUCTIONS = {
    "classifiers": CLASSIFIERS,
    "classifiers-224": CLASSIFIERS,
    "tokens": [
        *SHORT,
        "--model.gradient.reuse=1",
        "--data.batch_size=1",
        "--data.validation_images=1",
        "--data.test_images=1",
    ],
    "inverted": [*SHORT, *IMAGES],
    "edits": [*SHORT, *IMAGES],
    "edited": [*BACKBONE, "--model.images=photos/other/0.png", "--model.editing.steps=5"],
    "images": [*BACKBONE, "--model.sampling.steps=2", "--data.seeds=[0]"],
    "comparison": [
        "--pretrained=MODEL",
        "--images=1",
        "--sampling.steps=3",
        "--settings.search.words=2",
        "--settings.search.steps=1",
        "--settings.optimisation.steps=1",
        "--settings.candidates=2",
    ],
}
"""What the test adds to each command of the page, by its output folder; MODEL is a tiny one."""

RESULTS = {
    "classifiers": ["guide/model.safetensors", "judge/config.json", "table.csv", "splits.csv"],
    "classifiers-224": ["guide/model.safetensors", "judge/model.safetensors"],
    "tokens": ["embeddings/clown-tl.safetensors", "embeddings/nurse-tl.safetensors", "table.csv"],
    "inverted": ["embeddings/my-clown-tl.safetensors"],
    "edits": ["embeddings/clown-tl.safetensors", "embeddings/other-tl.safetensors"],
    "edited": ["images/**/0.png"],
    "images": ["images/*clown*.png"],
    "comparison": ["table.csv", "records.csv", "summary.json", "contact_sheet.png"],
}


def commands():
    """Output folder to the arguments of the command that fills it, in the page's order."""
    blocks = re.findall(r"^```console\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert all(words[0] == "tokenlearn" for words in lines)
    return {words[words.index("--output_dir") + 1]: words[1:] for words in lines}


@pytest.fixture
def _in_a_folder_with_photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for seed, (name, persona) in enumerate(CLASSES.items()):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(10):
            shown = {"persona": persona} if persona else {"persona_frequency": 0.0}
            portrait(seed, index, **shown)[1].save(tmp_path / "photos" / name / f"{index}.png")


@pytest.mark.usefixtures("_in_a_folder_with_photos")
def test_the_way_from_photos_to_a_table(tiny_models):
    found = commands()
    assert list(found) == list(REDUCTIONS) == list(RESULTS)
    for folder, words in found.items():
        added = [option.replace("MODEL", str(tiny_models / "pipeline")) for option in REDUCTIONS[folder]]
        main([*words, *added])
        for pattern in RESULTS[folder]:
            assert list(Path(folder).glob(pattern)), f"{folder}/{pattern}"
