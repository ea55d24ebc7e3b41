"""Images say how they were made, and are made again from what they say."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.command_line import error_of
from tokenlearn.main import main
from tokenlearn.pipeline import Sampling
from tokenlearn.provenance import Origin, key_of, read_origin, token_hashes
from tokenlearn.tokens import TokenBank, save_embedding


@pytest.fixture
def write(tiny_models, tmp_path):
    """Write a config of a task with a token, and give the command that runs it."""
    generator = torch.Generator().manual_seed(0)
    file = save_embedding(tmp_path / "smile.safetensors", "<smile>", [torch.randn(1, 16, generator=generator)], {})

    def config(task, data=None, **settings):
        backbone = {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_models / "pipeline")}}
        init_args = {"backbone": backbone, "embeddings": [str(file)], "sampling": {"steps": 3}} | settings
        content = {
            "model": {"class_path": task, "init_args": init_args},
            "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
        }
        if data is not None:
            content["data"] = {"class_path": "PromptList", "init_args": data}
        path = tmp_path / f"{task}.yaml"
        path.write_text(yaml.safe_dump(content))
        return ["predict", "--config", str(path), "--output_dir", str(tmp_path / "run")]

    return config


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


PROMPTS = {"prompts": ["a <smile> king", "a portrait, red"], "seeds": [3, 4], "batch_size": 3}


def test_generated_images(write, tmp_path, capsys):
    command = write("Generate", PROMPTS, sampling={"steps": 3, "guidance": 5, "negative_prompt": "a hat"})
    main(command)
    image = tmp_path / "run" / "images" / "000-a-smile-king-seed4.png"
    with Image.open(image) as opened:
        parameters, about = opened.info["parameters"], json.loads(opened.info["tokenlearn"])
    prompt, negative, settings = parameters.splitlines()
    assert (prompt, negative) == ("a <smile> king", "Negative prompt: a hat")
    token = about["tokens"]["<smile>"]
    for words in ("Steps: 3", "Sampler: DDIM", "CFG scale: 5", "Seed: 4", "Size: 16x16", "Model: pipeline"):
        assert f"{words}, " in settings
    assert f'TI hashes: "smile: {token}"' in settings

    main(["predict", "--from", str(image), "--output_dir", str(tmp_path / "again")])
    (again,) = (tmp_path / "again" / "images").iterdir()
    assert np.array_equal(pixels(again), pixels(image))
    assert key_of(again) == key_of(image)

    # Other settings, a file that is empty, and one of another program.
    other = pixels(tmp_path / "run" / "images" / "001-a-portrait-red-seed3.png")
    Image.new("RGB", (5, 5)).save(tmp_path / "run" / "images" / "holiday.png")
    image.write_bytes(b"")
    capsys.readouterr()
    main([*command, "--model.sampling.steps=2"])
    assert "has 1 images that are not of this run, such as 'images/holiday.png'" in capsys.readouterr().err
    assert not np.array_equal(pixels(tmp_path / "run" / "images" / "001-a-portrait-red-seed3.png"), other)
    assert pixels(image).shape == (16, 16, 3)
    assert pixels(tmp_path / "run" / "images" / "holiday.png").shape == (5, 5, 3)

    # Another token of the same name is refused.
    save_embedding(tmp_path / "smile.safetensors", "<smile>", [torch.ones(1, 16)], {})
    assert "other vectors of <smile>" in error_of(["predict", "--from", image, "--output_dir", tmp_path / "b"], capsys)


def test_edits(write, tmp_path):
    Image.fromarray((np.arange(20 * 30 * 3) % 256).astype(np.uint8).reshape(20, 30, 3)).save(tmp_path / "photo.png")
    command = write(
        "Edit",
        images=str(tmp_path / "photo.png"),
        edits=[{"<smile>": 3}],
        interpolations={"<smile>": [1, 2]},
        editing={"steps": 3, "timestep": 334},
    )
    main(command)
    image = tmp_path / "run" / "images" / "smile+3" / "photo.png"
    about = read_origin(image)
    assert (about["image"], about["prompt"]) == (str(tmp_path / "photo.png"), None)
    first = pixels(image)
    main(["predict", "--from", str(image), "--output_dir", str(tmp_path / "again")])
    assert np.array_equal(pixels(tmp_path / "again" / "images" / "smile+3" / "photo.png"), first)
    written = image.stat().st_mtime_ns
    main(command)
    assert image.stat().st_mtime_ns == written
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photo.png")  # another photo of the same name
    main(command)
    assert not np.array_equal(pixels(image), first)


def test_images_of_semantic_guidance(write, tmp_path):
    command = write(
        "Sega",
        prompts=["a portrait"],
        seeds=[1, 2],
        edits=[{"concept": "red", "scale": 4.0, "warmup_steps": 1}],
        batch_size=2,
    )
    main(command)
    image = tmp_path / "run" / "images" / "red" / "000-a-portrait-seed2.png"
    main(["predict", "--from", str(image), "--output_dir", str(tmp_path / "again")])
    for edit in ("red", "before"):
        first, again = (pixels(tmp_path / run / "images" / edit / image.name) for run in ("run", "again"))
        assert np.array_equal(first, again)
    written = image.stat().st_mtime_ns
    main([*command, "--model.seeds=[2, 1]"])  # the same images in another order
    assert image.stat().st_mtime_ns == written


def test_images_that_do_not_say_how_they_were_made(tmp_path, capsys):
    image = Image.new("RGB", (4, 4))
    image.save(tmp_path / "photo.jpg")
    image.save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no image")
    sheet = Origin({"model": {"class_path": "Generate"}}, {}, Sampling(), "model", "DDIM", "")
    image.save(tmp_path / "sheet.png", pnginfo=sheet.png_info(sheet.key("sheet")))
    for name, words in {
        "photo.jpg": "is a JPEG file",
        "plain.png": "does not say how it was made",
        "text.png": "is not an image",
        "sheet.png": "is a sheet",
        "missing.png": "does not exist",
    }.items():
        assert words in error_of(["predict", "--from", tmp_path / name], capsys)
    assert "predict --from" in error_of(["fit", "--from", tmp_path / "plain.png"], capsys)
    assert "predict --from" in error_of(["predict", "--from"], capsys)


def test_keys_differ_by_what_images_depend_on():
    def settings(tokens=None, sampling=None, precision=32, **init_args):
        config = {"model": {"class_path": "Edit", "init_args": init_args}, "trainer": {"precision": precision}}
        return Origin(config, tokens or {}, sampling or Sampling(), "model", "DDIM", "v").settings

    same = settings(edits=[1])
    assert same == settings(edits=[1], images="a", prompts=["b"], seeds=[1], batch_size=3, embeddings="c")
    others = [settings(edits=[2]), settings({"<a>": "1"}, edits=[1]), settings(None, Sampling(3), edits=[1])]
    assert len({same, *others, settings(precision="bf16-mixed", edits=[1])}) == 5


def test_hashes_are_of_the_vectors():
    bank = TokenBank({"<a>": 1, "<b>": 2}, [4])
    before = token_hashes(bank)
    bank.set("<b>", [torch.ones(2, 4)])
    assert token_hashes(bank)["<a>"] == before["<a>"]
    assert token_hashes(bank)["<b>"] != before["<b>"]
    assert token_hashes(None) == {}


def test_values_with_commas_are_quoted():
    origin = Origin({}, {"<a>": "12", "<b>": "34"}, Sampling(2), "models/my, model", "DDIM", "")
    line = origin.parameters("an <a> and a <b>", 1, (8, 16)).splitlines()[1]
    assert 'Model: "my, model"' in line
    assert 'TI hashes: "a: 12, b: 34"' in line
    assert "Size: 8x16" in line
