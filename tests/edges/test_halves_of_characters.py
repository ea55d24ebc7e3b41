"""Lone surrogates, halves of characters: escapes and bytes of another encoding give them, and nothing takes them."""

import json

import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.command_line import error_of
from tests.edges.test_foreign_origins import WHOLE
from tokenlearn.errors import UserError
from tokenlearn.models import StableDiffusion
from tokenlearn.pipeline import Pipeline, Sampling
from tokenlearn.provenance import CHUNK, read_origin

HALVES = ["\ud83d", "\ude00", "\udcff"]


def shown(half):
    return f"\\{half.encode('unicode_escape').decode()[1:]}"


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("data.init_args.templates", lambda half: [f"a {half} {{}}"]),
        ("model.init_args.classes", lambda half: {f"wiz{half}ard": "man"}),
        ("model.init_args.classes", lambda half: {"wizard": half}),
        ("model.init_args.sampling", lambda half: {"negative_prompt": half}),
        ("output_dir", lambda half: f"runs/{half}"),
    ],
)
def test_in_a_config(tiny_config, capsys, half, place, value):
    config = tiny_config({place: value(half)})
    line = error_of(["fit", "--config", config], capsys)
    assert f"config file '{config}': the text '" in line
    assert f"has '{shown(half)}', which is half of a character" in line
    assert "type this character again" in line


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("escaped", [False, True])
def test_in_an_option(tiny_config, capsys, half, escaped):
    text = yaml.safe_dump([f"a {half} {{}}"]) if escaped else f"['a {half} {{}}']"
    line = error_of(["fit", "--config", tiny_config(), f"--data.templates={text.strip()}"], capsys)
    assert "tokenlearn: error: option '" in line
    assert f"has '{shown(half)}', which is half of a character" in line


@pytest.mark.parametrize("half", HALVES)
def test_in_a_prompt(tiny_models, half):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    for prompt, negative in ((f"a {half}", ""), ("a man", half)):
        with pytest.raises(UserError, match=r"prompt '.*' has '\\ud.*half of a character"):
            Pipeline(backbone, sampling=Sampling(steps=1, negative_prompt=negative))(prompt, seeds=[1])


def test_in_what_an_image_says(tmp_path):
    info = PngInfo()
    info.add_text(CHUNK, json.dumps(WHOLE | {"prompt": "a \ud83d"}))
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png", pnginfo=info)
    with pytest.raises(UserError, match="does not say how it was made"):
        read_origin(tmp_path / "image.png")


def test_whole_characters_are_fine(tiny_models):
    image = Pipeline(StableDiffusion(str(tiny_models / "pipeline")), sampling=Sampling(steps=1))("a 😀 é", seeds=[1])
    assert len(image) == 1
