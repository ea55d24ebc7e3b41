"""The benchmark of reused guidance, on the tiny model."""

import json

import pytest
import torch
from PIL import Image

import tokenlearn as tl
from benchmarks.guidance_reuse import WAYS, images_by_way, main, summary
from tests.tiny import tiny_classifier
from tokenlearn.errors import UserError
from tokenlearn.guidance import SemanticEdit

EDIT = SemanticEdit(concept="glasses", scale=6, warmup_steps=0)


@pytest.fixture
def pipeline(tiny_models):
    return tl.Pipeline.from_pretrained(str(tiny_models / "pipeline"), sampling=tl.Sampling(steps=3, guidance=4.0))


def test_guidance_of_the_same_prompt_and_seed_is_its_own(pipeline):
    with torch.no_grad():
        (found,) = images_by_way(pipeline, "a king", ["a king"], [1, 2], EDIT).values()
    assert tuple(found) == WAYS
    torch.testing.assert_close(found["reused"], found["own guidance"])
    for one, other in (("plain", "reused"), ("reused", "reused, other seed")):
        assert not torch.allclose(found[one], found[other])


def test_a_summary():
    shown = {prompt: dict.fromkeys(WAYS, values) for prompt, values in (("a", [1.0, 0.0]), ("b", [1.0, 1.0]))}
    of_way = summary(shown)["reused"]
    assert (of_way["share"], of_way["images"]) == (0.75, 4)
    assert of_way["interval"][0] < 0.75 < of_way["interval"][1]


def test_the_command(tiny_models, tmp_path, capsys):
    judge = str(tiny_classifier(tmp_path / "judge", ["smile", "hat"], multi_label=True))
    settings = {"pretrained": str(tiny_models / "pipeline"), "judge": judge, "label": "hat"}
    main(**settings, prompts=("a king", "a man"), seeds=3, batch_size=3, steps=3, output_dir=str(tmp_path / "out"))
    *_, figure, figures = capsys.readouterr().out.strip().splitlines()
    assert {of_way["images"] for of_way in json.loads(figures).values()} == {6}
    with Image.open(figure) as image:
        assert image.height > 8 * 16  # two prompts in four ways
    with pytest.raises(UserError, match="a batch needs two seeds, got batch_size 8 for 9 seeds"):
        main(**settings, seeds=9)
