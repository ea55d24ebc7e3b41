"""The page without a browser: images while they form, edits, the judge, and files that make the same images again."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import tokenlearn as tl
from tests.tiny import tiny_classifier
from tests.tiny_xl import WIDTHS, tiny_xl_pipeline
from tokenlearn.errors import UserError
from tokenlearn.main import main
from tokenlearn.models import TimmClassifier
from tokenlearn.page.request import MOST_PIXELS, PageRequest, parse_seeds
from tokenlearn.page.studio import Studio
from tokenlearn.tokens import load_embedding, save_embedding


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    path = tmp_path / "holiday.png"
    Image.fromarray(pixels).save(path)
    return path


def asked(**changes):
    return PageRequest(**{"prompt": "a photo of a king", "steps": 4, **changes})


def last(frames):
    (*_, frame) = frames
    assert frame.finished
    return frame


def pixels(image):
    return np.asarray(image, dtype=int)


def test_images_form_step_by_step(studio):
    frames = list(studio.generate(asked(seeds=(3, 4))))
    assert [frame.finished for frame in frames] == [False] * (len(frames) - 1) + [True]
    shown = {len(frame.before) for frame in frames}
    assert shown == {1, 2}
    first = [frame.before[0].tobytes() for frame in frames if len(frame.before) == 1]
    assert len(set(first)) > 1, "previews differ from step to step"
    assert frames[-1].before == frames[-1].after


def test_generated_images_are_those_of_the_pipeline(studio):
    plain = last(studio.generate(asked(seeds=(3, 4))))
    pipeline = studio.pipeline.with_sampling(steps=4, guidance=4.0)
    for image, seed in zip(plain.after, (3, 4), strict=True):
        assert np.array_equal(pixels(image), pixels(pipeline("a photo of a king", seeds=[seed])[0]))
    steered = last(studio.generate(asked(concepts={"glasses": 8.0})))
    concept = tl.SemanticEdit(
        concept="glasses", scale=8, threshold=0.9, warmup_steps=0, momentum_scale=0.3, momentum_beta=0.6
    )
    (expected,) = pipeline("a photo of a king", seeds=[1], guidance=tl.SEGA([concept], 4.0))
    assert np.array_equal(pixels(steered.after[0]), pixels(expected))
    assert not np.array_equal(pixels(steered.after[0]), pixels(steered.before[0]))


def test_strength_0_is_exactly_the_unedited_image(studio, photo):
    for request in (asked(), asked(photo=photo)):
        frame = last(studio.show(PageRequest(**{**vars(request), "tokens": {"<hat>": 0.0}, "concepts": {"hat": 0}})))
        assert np.array_equal(pixels(frame.after[0]), pixels(frame.before[0]))
    assert np.array_equal(pixels(frame.after[0]), pixels(Image.open(photo)))


def test_tokens_edit_a_photo_as_the_pipeline_does(studio, photo):
    frame = last(studio.edit(asked(photo=photo, tokens={"<hat>": 3.0})))
    pipeline = studio.pipeline.with_sampling(steps=4)
    settings = {"inversion": "edit_friendly", "timestep": 751, "steps": 4, "paste": "always"}
    expected = pipeline.edit(photo, {"<hat>": 3.0}, **settings)
    assert frame.after[0].size == (30, 40)
    assert np.array_equal(pixels(frame.after[0]), pixels(expected))
    assert not np.array_equal(pixels(frame.after[0]), pixels(frame.before[0]))


def test_concepts_and_tokens_edit_a_photo_together(studio, photo):
    both = last(studio.edit(asked(photo=photo, tokens={"<hat>": 3.0}, concepts={"glasses": 8.0}))).after[0]
    for part in ({"tokens": {"<hat>": 3.0}}, {"concepts": {"glasses": 8.0}}):
        alone = last(studio.edit(asked(photo=photo, **part))).after[0]
        assert not np.array_equal(pixels(alone), pixels(both))


def test_a_calibrated_strength_is_the_length_of_the_way(studio, photo):
    assert studio.is_calibrated("<smile>")
    assert not studio.is_calibrated("<hat>")
    assert studio.strength_range("<smile>") == (-1.0, 0.63)
    assert studio.strength_range("<hat>") == (-6.0, 6.0)
    config = yaml.safe_load(studio.yaml_of(asked(photo=photo, tokens={"<smile>": 0.3, "<hat>": 2})))
    assert config["model"]["init_args"]["edits"] == [{"<smile>": pytest.approx(1.0), "<hat>": 2}]
    with pytest.raises(UserError, match=r"0\.9 is out of the range"):
        list(studio.generate(asked(tokens={"<smile>": 0.9})))


def test_a_moved_slider_samples_and_inverts_nothing_again(studio, photo, monkeypatch):
    list(studio.generate(asked(seeds=(11,), tokens={"<hat>": 1.0})))
    monkeypatch.setattr(type(studio.pipeline), "sample_latents", None)
    monkeypatch.setattr(tl.editing.ImageEditor, "invert", None)
    first, second = (last(studio.generate(asked(seeds=(11,), tokens={"<hat>": value}))) for value in (1.0, 2.0))
    assert not np.array_equal(pixels(first.after[0]), pixels(second.after[0]))


def test_a_closed_request_stops_within_a_step(studio):
    threads = threading.active_count()
    frames = studio.generate(asked(steps=100, seeds=(21, 22, 23)))
    next(frames)
    began = time.monotonic()
    frames.close()
    assert time.monotonic() - began < 5
    assert threading.active_count() == threads


def test_two_requests_at_once_do_not_disturb_each_other(studio):
    requests = [asked(seeds=(31,), tokens={"<hat>": 2.0}), asked(seeds=(32,), concepts={"glasses": 9.0})]
    fresh = Studio(studio.pipeline, preview_interval=0)
    fresh.pipeline = studio.pipeline
    alone = [last(fresh.show(request)).after[0] for request in requests]
    iterators = [studio.show(request) for request in requests]
    for first, second in zip(*iterators, strict=False):
        together = [first, second]
    ends = [frame if frame.finished else last(rest) for frame, rest in zip(together, iterators, strict=True)]
    for image, frame in zip(alone, ends, strict=True):
        assert np.array_equal(pixels(image), pixels(frame.after[0]))


def test_the_judge_gives_a_probability_for_each_label(studio, tmp_path):
    image = Image.fromarray(np.full((16, 16, 3), 90, dtype=np.uint8))
    opinion = studio.opinion([image, image])
    assert list(opinion) == ["ordinary person", "wizard", "pirate"]
    assert sum(opinion.values()) == pytest.approx(1)
    independent = Studio(
        studio.pipeline, judge=TimmClassifier(str(tiny_classifier(tmp_path / "m", ["hat"], multi_label=True)))
    )
    logit = independent.judge(torch.full((1, 3, 16, 16), 90 / 255)).item()
    assert independent.opinion([image])["hat"] == pytest.approx(1 / (1 + np.exp(-logit)))


def test_without_tokens_and_judge(tiny_models):
    bare = Studio(tl.Pipeline.from_pretrained(str(tiny_models / "pipeline")))
    frame = last(bare.generate(asked(concepts={"glasses": 8.0})))
    assert bare.tokens == {}
    assert bare.opinion(frame.after) == {}
    assert "embeddings" not in bare.yaml_of(asked())
    with pytest.raises(UserError, match="<hat>"):
        list(bare.generate(asked(tokens={"<hat>": 1.0})))


@pytest.mark.parametrize(
    ("of_photo", "changes"),
    [
        (False, {"seeds": (5, 6)}),
        (False, {"concepts": {"glasses": 8.0, "hat - man": -5.0}, "negative_prompt": "a wizard"}),
        (False, {"tokens": {"<smile>": 0.3, "<hat>": -2.0}, "seeds": (5, 6)}),
        (False, {"tokens": {"<hat>": 2.0}, "concepts": {"glasses": 8.0}, "prompt": "a <hat> king"}),
        (True, {"tokens": {"<hat>": 2.0}}),
        (True, {"concepts": {"glasses": 8.0}, "change": 0.5}),
        (True, {"tokens": {"<smile>": 0.3, "<hat>": 2.0}, "concepts": {"glasses": 8.0}}),
    ],
)
def test_the_yaml_makes_the_same_images(studio, photo, tmp_path, monkeypatch, of_photo, changes):
    monkeypatch.chdir(tmp_path)
    request = asked(**changes, photo=photo if of_photo else None)
    shown = last(studio.show(request)).after
    Path("page.yaml").write_text(studio.yaml_of(request))
    main(["predict", "--config", "page.yaml", "--output_dir", "run", "--trainer.enable_progress_bar", "false"])
    files = sorted(path for path in Path("run/images").rglob("*.png") if "before" not in path.parts)
    if (Path("run/images") / "all").is_dir():
        files = [path for path in files if "all" in path.parts]
    assert len(files) == len(shown)
    for file, image in zip(files, shown, strict=True):
        assert np.array_equal(pixels(Image.open(file)), pixels(image))


def test_the_yaml_names_the_files_that_are_used(tiny_models, token_files, monkeypatch):
    pipeline = tl.Pipeline.from_pretrained(str(tiny_models / "pipeline"))
    monkeypatch.chdir(token_files.parent)
    hat, smile = (f"{token_files.name}/{name}-tl.safetensors" for name in ("hat", "smile"))
    for embeddings, expected in (
        (token_files.name, [hat]),
        ([hat, smile], [hat]),
        ({"<cap>": hat, "<grin>": smile}, {"<cap>": hat}),
    ):
        named = Studio(pipeline, embeddings=embeddings)
        token = "<cap>" if isinstance(embeddings, dict) else "<hat>"
        for request in (asked(prompt=f"a {token} king"), asked(tokens={token: 2.0}), asked(concepts={token: 5.0})):
            config = yaml.safe_load(named.yaml_of(request))
            assert config["model"]["init_args"]["embeddings"] == expected


def test_yaml_of_an_unedited_photo(studio, photo):
    with pytest.raises(UserError, match="not edited"):
        studio.yaml_of(asked(photo=photo))


def test_a_token_is_saved_for_a_program(studio, tmp_path):
    path = studio.token_file("<hat>", tmp_path, format="diffusers", strength=1.5)
    saved, original = load_embedding(path), studio.tokens["<hat>"]
    assert saved.token == "<hat>"
    np.testing.assert_allclose(saved.arrays[0], 1.5 * original.arrays[0], rtol=1e-6)
    with pytest.raises(UserError, match=r"<cap>.*<hat>, <smile>"):
        studio.token_file("<cap>", tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": ()}, "seeds"),
        ({"seeds": tuple(range(9))}, "9 seeds"),
        ({"seeds": (2**63,)}, "seeds"),
        ({"steps": 0}, "steps"),
        ({"steps": 101}, "101"),
        ({"guidance": float("nan")}, "guidance"),
        ({"prompt": "a" * 1001}, "1001 characters"),
        ({"negative_prompt": "\ud800"}, "negative prompt"),
        ({"concepts": {"king - ": 5.0}}, "king -"),
        ({"concepts": {"hat": float("inf")}}, "hat"),
        ({"tokens": {"<hat>": 101.0}}, "<hat>"),
        ({"change": 0.0}, "change"),
    ],
)
def test_bounds(changes, words):
    with pytest.raises(UserError, match=words):
        asked(**changes)


@pytest.mark.parametrize(("text", "seeds"), [("7", (7,)), (" 1,2  3;2 ", (1, 2, 3)), ("", ())])
def test_seeds_as_typed(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["one", "-1", "1.5", " ".join("123456789"), "9" * 20])
def test_seeds_that_are_none(text):
    with pytest.raises(UserError, match="seed"):
        parse_seeds(text)


def test_photos_that_cannot_be_used(studio, photo, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    cut = tmp_path / "cut.png"
    cut.write_bytes(photo.read_bytes()[:1500])
    Image.new("1", (5001, 5001)).save(tmp_path / "giant.png")
    assert MOST_PIXELS < 5001 * 5001
    Image.new("RGB", (400, 16)).save(tmp_path / "long.png")
    for name, words in (("text", "text.png"), ("cut", "cut.png"), ("giant", "5001x5001"), ("long", "400x16")):
        with pytest.raises(UserError, match=words) as raised:
            list(studio.edit(asked(photo=tmp_path / f"{name}.png", tokens={"<hat>": 1.0})))
        assert str(tmp_path) not in str(raised.value), "the place on the server is not told"


@pytest.mark.parametrize("change", [0.01, 1.0])
def test_the_noise_level_is_one_of_the_steps(studio, photo, change):
    frame = last(studio.edit(asked(photo=photo, tokens={"<hat>": 3.0}, concepts={"glasses": 2.0}, change=change)))
    assert frame.after[0].size == frame.before[0].size


@pytest.fixture
def xl_studio(tmp_path):
    folder = tiny_xl_pipeline(tmp_path / "xl")
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(1, width, generator=generator) for width in WIDTHS]
    save_embedding(tmp_path / "hat-tl.safetensors", "<hat>", vectors, {})
    pipeline = tl.Pipeline.from_pretrained(str(folder))
    return Studio(pipeline, embeddings=str(tmp_path / "hat-tl.safetensors"), preview_interval=0)


def test_a_model_with_two_text_encoders(xl_studio, photo):
    """Tokens of both, concepts, photos and previews, as of the model with one."""
    request = asked(tokens={"<hat>": 2.0}, concepts={"glasses": 8.0})
    frames = list(xl_studio.show(request))
    assert len(frames) > 2, "previews while the images form"
    assert not np.array_equal(pixels(frames[-1].after[0]), pixels(frames[-1].before[0]))
    frame = last(xl_studio.show(asked(photo=photo, tokens={"<hat>": 2.0})))
    assert not np.array_equal(pixels(frame.after[0]), pixels(frame.before[0]))
    config = yaml.safe_load(xl_studio.yaml_of(request))
    assert config["model"]["init_args"]["backbone"]["class_path"].endswith("StableDiffusionXL")
