"""The benchmark of even strengths, on the tiny model."""

import json

import pytest
import torch
from PIL import Image

import tokenlearn as tl
from benchmarks.calibration_evenness import drawn_photos, main, summary
from tests.tiny import tiny_classifier
from tokenlearn.errors import UserError


def test_a_summary():
    found = summary({"<a>": (1.0, 0.5), "<b>": (0.5, 0.4)})
    assert found == {"before": 0.75, "after": 0.45, "ratio": 0.6, "halved": 0.5}


def test_unevenness_is_measured_on_other_images_in_other_features(tiny_models, tmp_path, capsys):
    pipe = tl.Pipeline.from_pretrained(str(tiny_models / "pipeline"))
    tl.direction(pipe, positive=["a man with glasses"], negative=["a man"], token="<glasses>").save(tmp_path / "made")
    for index in range(2):
        pixels = torch.randint(0, 255, (16, 16, 3), generator=torch.Generator().manual_seed(index))
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels.byte().numpy()).save(tmp_path / "images" / f"{index}.png")
    classifiers = {
        name: str(tiny_classifier(tmp_path / name, ["smile", "hat"], multi_label=True)) for name in ("guide", "judge")
    }
    settings = {
        "embeddings": str(tmp_path / "made"),
        "pretrained": str(tiny_models / "pipeline"),
        "images": str(tmp_path / "images"),
        "classifier": classifiers["guide"],
        "judge": classifiers["judge"],
    }
    main(**settings, calibrated_on=1, measured_on=1, strengths=(0, 40), points=5)
    *_, row, figures = capsys.readouterr().out.strip().splitlines()
    found = json.loads(figures)
    values = [found["before"], found["after"], found["own"]["before"], found["own"]["after"]]
    assert row.split() == ["<glasses>", *(f"{value:.3f}" for value in values)]
    assert values[:2] != values[2:]
    assert found["ratio"] == pytest.approx(found["after"] / found["before"], abs=1e-3)
    with pytest.raises(UserError, match="has 2 images and 3 are needed"):
        main(**settings, calibrated_on=2, measured_on=1)
    with pytest.raises(UserError, match=r"'<hat>' is no token .* known are <glasses>"):
        main(**settings, calibrated_on=1, measured_on=1, tokens=("<hat>",))


def test_drawn_photos_differ_and_more_contain_fewer():
    more, fewer = ([photo.tobytes() for photo in drawn_photos(number)] for number in (6, 3))
    assert len(set(more)) == 6
    assert more[:3] == fewer
