"""Calibration of tokens of the tiny model, and the commands that make directions and calibrate files."""

import itertools

import pytest
import torch
import yaml
from PIL import Image

import tokenlearn as tl
from tests.command_line import error_of
from tests.tiny import tiny_classifier
from tokenlearn.calibration import measure_unevenness
from tokenlearn.editing import ImageEditor
from tokenlearn.errors import UserError
from tokenlearn.generation import Edit
from tokenlearn.image_functions import read_images
from tokenlearn.main import main
from tokenlearn.metrics import perceptual_distance
from tokenlearn.models import TimmClassifier
from tokenlearn.pipeline import Pipeline
from tokenlearn.tokens import load_embedding, save_embedding

SETTINGS = {"steps": 4, "timestep": 501, "inversion": "edit_friendly"}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return str(tiny_classifier(tmp_path_factory.mktemp("classifier"), ["smile", "hat"], multi_label=True))


@pytest.fixture(scope="module")
def pipe(tiny_models):
    return Pipeline.from_pretrained(str(tiny_models / "pipeline"))


@pytest.fixture(scope="module")
def glasses(pipe):
    return tl.direction(pipe, positive=["a man with glasses"], negative=["a man"], token="<glasses>")


def photo(size=(16, 16)):
    pixels = torch.randint(0, 255, (size[1], size[0], 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.byte().numpy())


def test_lengths_are_those_of_the_path_of_edits(pipe, glasses, classifier):
    known = pipe.with_tokens(glasses)
    images = [photo(), photo((20, 16))]
    found = tl.calibrate(
        known,
        "<glasses>",
        images,
        classifier=classifier,
        strengths=(0, 40),
        points=5,
        bound=2,
        compared=4,
        editing=tl.Editing(**SETTINGS),
    )
    judge, editor, source = TimmClassifier(classifier), ImageEditor(pipe.backbone, tl.Editing(**SETTINGS)), [""]
    steps = []
    with torch.no_grad():
        empty, condition = pipe.encode(source), known.encode(["<glasses>"])
        for image in read_images(images, pipe.backbone):
            noisy = editor.invert(pipe.backbone.encode_images(image.image), empty)
            edited = [editor.denoise_towards(noisy, empty, [condition], [float(s)]) for s in (0, 10, 20, 30, 40)]
            features = [judge.trunk_features(item) for item in edited]
            pairs = itertools.pairwise(features)
            steps.append(torch.cat([perceptual_distance(one, other).sqrt() for one, other in pairs]))
    lengths = torch.stack(steps).mean(dim=0).cumsum(dim=0)
    assert found.strengths == (0, 10, 20, 30, 40)
    assert found.lengths[1:] == pytest.approx((lengths / lengths[-1]).tolist(), rel=1e-2)
    before, after = found.unevenness
    assert before > 0
    assert after > 0
    again = measure_unevenness(
        known, "<glasses>", found, images, classifier=classifier, compared=4, editing=tl.Editing(**SETTINGS)
    )
    assert again == pytest.approx(found.unevenness)

    calibrated = pipe.with_tokens(glasses.calibrated("<glasses>", found))
    strength = found.strength(0.6)
    assert (
        calibrated.edit(photo(), {"<glasses>": 0.6}, calibrated=True, **SETTINGS).tobytes()
        == known.edit(photo(), {"<glasses>": strength}, **SETTINGS).tobytes()
    )
    assert not glasses.bank.calibrations
    with pytest.raises(UserError, match=r"calibrated is true, but '<glasses>' has no calibrated strengths"):
        known.edit(photo(), {"<glasses>": 0.6}, calibrated=True, **SETTINGS)
    with pytest.raises(UserError, match=r"2 is out of the range"):
        calibrated.edit(photo(), {"<glasses>": 2}, calibrated=True, **SETTINGS)
    with pytest.raises(UserError, match="are of tokens"):
        calibrated.edit(photo(), tl.SEGA(["hat"]), calibrated=True, **SETTINGS)
    with pytest.raises(UserError, match=r"strengths must be a range around 0.*\[1, 2\]"):
        tl.calibrate(known, "<glasses>", photo(), classifier=classifier, strengths=(1, 2))
    with pytest.raises(UserError, match="'<hat>'"):
        tl.calibrate(known, "<hat>", photo(), classifier=classifier)


def test_directions_and_calibration_by_the_command_line(tiny_models, classifier, pipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {
        "pretrained": str(tiny_models / "pipeline"),
        "templates": ["a photo of a {}", "a portrait of a {}"],
        "directions": {"<glasses>": {"positive": ["man with glasses"], "negative": ["man"]}},
    }
    (tmp_path / "directions.yaml").write_text(yaml.safe_dump(config))
    main(["directions", "--config", "directions.yaml", "--output_dir", "made"])
    assert capsys.readouterr().out.strip() == "made/glasses-tl.safetensors"
    expected = tl.direction(
        pipe,
        positive=["a photo of a man with glasses", "a portrait of a man with glasses"],
        negative=["a photo of a man", "a portrait of a man"],
        token="<glasses>",
    )
    made = load_embedding("made/glasses-tl.safetensors")
    torch.testing.assert_close(made.vectors[0], expected.bank.get("<glasses>")[0].detach())
    broken = config | {"directions": {"<glasses>": {"positive": ["a", "b"], "negative": ["a"]}}}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    error = error_of(["directions", "--config", "broken.yaml"], capsys)
    assert "directions.<glasses>" in error
    assert "4 positive and 2 negative" in error

    photo().save("photo.png")
    editing = [f"--editing.{name}={value}" for name, value in SETTINGS.items()]
    words = ["--file", "made/glasses-tl.safetensors", "--images", "photo.png", "--classifier", classifier]
    error = error_of(["calibrate", *words, *editing], capsys)
    assert "'pipeline'" in error  # the file says the model's name, not where it is on this machine
    assert "--pretrained" in error
    words += ["--pretrained", config["pretrained"]]
    main(["calibrate", *words, "--strengths=[0,20]", "--points=5", "--compared=3", "--bound=2", *editing])
    assert "unevenness" in capsys.readouterr().out
    calibrated = load_embedding("made/glasses-tl.safetensors")
    assert torch.equal(calibrated.vectors[0], made.vectors[0])
    assert calibrated.metadata.items() > made.metadata.items()

    edit = Edit(
        pipe.backbone,
        images="photo.png",
        edits=[{"<glasses>": 0.5}],
        interpolations={"<glasses>": [0, 0.25]},
        embeddings="made",
        editing=tl.Editing(**SETTINGS),
        calibrated=True,
    )
    edit.on_predict_start()
    strength = edit.bank.calibrations["<glasses>"].strength(0.5)
    plain = Edit(
        pipe.backbone,
        images="photo.png",
        edits=[{"<glasses>": strength}],
        embeddings="made",
        editing=tl.Editing(**SETTINGS),
    )
    with torch.no_grad():
        (ours,), (theirs,) = (task.edit_images([task.images[0]]) for task in (edit, plain))
    torch.testing.assert_close(ours.edits, theirs.edits, rtol=1e-3, atol=1e-3)  # batches of 3 and of 1
    # Other vectors have another path.
    path = save_embedding(
        tmp_path / "twice.safetensors", "<g>", calibrated.vectors, calibrated.metadata, scale=2.0, space="output"
    )
    assert "calibration" not in load_embedding(path).metadata
