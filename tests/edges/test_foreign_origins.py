"""PNG files that claim to be of this package: what they say is checked before anything is made of it."""

import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.command_line import error_of
from tokenlearn.errors import UserError
from tokenlearn.files import atomic_write, check_writable
from tokenlearn.provenance import CHUNK, config_of, read_origin

CONFIG = {
    "model": {"class_path": "tokenlearn.generation.Generate", "init_args": {"sampling": {"steps": 1}}},
    "data": {"class_path": "tokenlearn.data.PromptList", "init_args": {}},
    "trainer": {"precision": "32-true", "accelerator": "cpu"},
}
WHOLE = {
    "version": "0.1.0",
    "key": "a-b",
    "prompt": "a man",
    "seed": 1,
    "image": None,
    "batch_size": 2,
    "tokens": {},
    "model": "model",
    "scheduler": "DDIM",
    "steps": 1,
    "guidance_scale": 1.0,
    "config": CONFIG,
}


def with_config(**sections):
    return WHOLE | {"config": CONFIG | sections}


def without(name):
    return {key: value for key, value in WHOLE.items() if key != name}


FOREIGN = {
    "a list": [1],
    "null": None,
    "text": "text",
    **{f"no {name}": without(name) for name in ("batch_size", "prompt", "seed", "tokens", "config", "image")},
    **{f"batches of {size!r}": WHOLE | {"batch_size": size} for size in ("x", 0, -1, 10**9, 1.5, None, [1])},
    **{f"the prompt {prompt!r}": WHOLE | {"prompt": prompt} for prompt in (3, ["a"], {})},
    **{f"the seed {seed!r}": WHOLE | {"seed": seed} for seed in ("x", None, -1, 2**63, [1], 0.5)},
    **{f"tokens of {tokens!r}": WHOLE | {"tokens": tokens} for tokens in ([1], "x", None)},
    **{f"an image of {image!r}": WHOLE | {"prompt": None, "image": image} for image in (3, ["a"])},
    **{f"the config {config!r}": WHOLE | {"config": config} for config in ("x", [], {}, None)},
    "a model by name": with_config(model="Generate"),
    "a model without a class": with_config(model={"init_args": {}}),
    "a class of a list": with_config(model={"class_path": ["a"]}),
    "settings of a list": with_config(model={"class_path": "Generate", "init_args": [1]}),
    "data by name": with_config(data="PromptList"),
    "a trainer by name": with_config(trainer="x"),
    "callbacks": with_config(trainer={"callbacks": [{"class_path": "os.mkdir", "init_args": {"path": "evil"}}]}),
    "an output folder": with_config(output_dir="evil"),
    "a section of another name": with_config(checkpoint={"dirpath": "evil"}),
    "a checkpoint of a number": with_config(ckpt_path=3),
}


def image_with(chunk, path):
    info = PngInfo()
    info.add_text(CHUNK, chunk)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize("name", list(FOREIGN))
def test_what_a_foreign_image_says_is_refused(tmp_path, name):
    path = image_with(json.dumps(FOREIGN[name]), tmp_path / "a.png")
    with pytest.raises(UserError, match="does not say how it was made"):
        read_origin(path)


@pytest.mark.parametrize("chunk", ["", "words", "[" * 100_000, "{", '{"config": NaN}'])
def test_chunks_that_are_no_objects(tmp_path, chunk):
    with pytest.raises(UserError, match="does not say how it was made"):
        read_origin(image_with(chunk, tmp_path / "a.png"))


def test_what_an_image_of_this_package_says(tmp_path):
    about = read_origin(image_with(json.dumps(WHOLE), tmp_path / "a.png"))
    assert config_of(about)["data"]["init_args"] == {"prompts": ["a man"], "seeds": [1, 1], "batch_size": 2}
    photo = WHOLE | {"prompt": None, "image": "a.jpg", "config": {"model": CONFIG["model"]}}
    again = config_of(read_origin(image_with(json.dumps(photo), tmp_path / "b.png")))
    assert again["model"]["init_args"]["images"] == "a.jpg"


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "a/" * 3000])
def test_folders_that_cannot_be(tmp_path, name):
    with pytest.raises(UserError, match="choose another output folder") as caught:
        check_writable(tmp_path / name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
    assert not list(tmp_path.iterdir())


def test_a_file_of_a_folders_name(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="a folder of that name exists"), atomic_write(tmp_path / "a"):
        pass


def test_a_foreign_image_on_the_command_line(tmp_path, capsys):
    path = image_with(json.dumps(FOREIGN["batches of 1000000000"]), tmp_path / "a.png")
    assert "give a PNG file that 'tokenlearn predict' wrote" in error_of(["predict", "--from", path], capsys)
