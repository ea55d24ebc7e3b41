import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.tiny_if import tiny_if_pipeline
from tests.tiny_xl import tiny_xl_pipeline
from tokenlearn.diffusion import EDICT, LastK
from tokenlearn.errors import UserError
from tokenlearn.guidance import SEGA, ClassifierFreeGuidance
from tokenlearn.pipeline import Pipeline, Sampling, to_images
from tokenlearn.tokens import LearnedTokens, TokenBank, save_embedding


@pytest.fixture(scope="module")
def pipe(tiny_models):
    return Pipeline.from_pretrained(str(tiny_models / "pipeline"), sampling=Sampling(steps=3, guidance=4.0))


def bank(token, value):
    made = TokenBank({token: 1}, [16])
    made.set(token, [torch.full((1, 16), value)])
    return made


def test_images_are_those_of_diffusers(tiny_models, pipe):
    theirs = StableDiffusionPipeline.from_pretrained(tiny_models / "pipeline", safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        ["a king", "a wizard"],
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(7) for _ in range(2)],
        output_type="pt",
    ).images
    images = pipe(["a king", "a wizard"], seeds=[7])
    assert [image.size for image in images] == [(16, 16)] * 2
    for image, other in zip(images, to_images(expected), strict=True):
        difference = torch.tensor(list(image.tobytes())) - torch.tensor(list(other.tobytes()))
        assert difference.abs().max() <= 1


def test_pipelines_with_different_tokens_share_a_backbone(pipe):
    smile, hat = pipe.with_tokens(bank("<smile>", 0.3)), pipe.with_tokens(bank("<hat>", -0.3))
    with torch.no_grad():
        first = smile.generate(["a <smile> king"], [1])
        assert not torch.equal(hat.generate(["a <hat> king"], [1]), first)
        assert torch.equal(smile.generate(["a <smile> king"], [1]), first)
        assert not torch.equal(pipe.generate(["a smile king"], [1]), first)
        with pytest.raises(UserError, match=r"'<smile>' of 'a <smile> king' is not loaded; no token is"):
            pipe.generate(["a <smile> king"], [1])
    assert pipe.tokens is None


@pytest.mark.parametrize("form", ["bank", "learned", "file", "folder", "renamed"])
def test_tokens_in_every_form(pipe, tmp_path, form):
    tokens = bank("<smile>", 0.3)
    path = save_embedding(tmp_path / "smile.safetensors", "<smile>", tokens.get("<smile>"), {})
    given = {
        "bank": tokens,
        "learned": LearnedTokens(tokens),
        "file": [str(path)],
        "folder": str(tmp_path),
        "renamed": {"<grin>": str(path)},
    }[form]
    name = "<grin>" if form == "renamed" else "<smile>"
    with torch.no_grad():
        expected = pipe.with_tokens(tokens).generate(["a <smile> king"], [1])
        assert torch.equal(pipe.with_tokens(given).generate([f"a {name} king"], [1]), expected)


def test_settings_of_one_call(pipe):
    two = pipe("a king", seeds=[1, 2], batch_size=1)
    together = pipe("a king", seeds=[1, 2])
    assert [list(image.tobytes()) for image in two] == [list(image.tobytes()) for image in together]
    assert pipe("a king", size=(32, 16))[0].size == (16, 32)
    plain = pipe("a king", guidance=2.0)[0]
    assert pipe("a king", guidance=ClassifierFreeGuidance(2.0))[0].tobytes() == plain.tobytes()
    assert pipe("a king", negative_prompt="old hat")[0].tobytes() != pipe("a king")[0].tobytes()
    steered = pipe("a king", steps=12, guidance=SEGA(["glasses"], guidance_scale=4.0, scale=8))
    assert steered[0].tobytes() != pipe("a king", steps=12)[0].tobytes()
    assert pipe.sampling == Sampling(steps=3, guidance=4.0)


def test_the_gradient_reaches_the_tokens_through_any_solver(pipe):
    tokens = bank("<smile>", 0.3)
    with_smile = pipe.with_tokens(tokens)
    for options in ({"gradient": LastK(2)}, {"gradient": LastK(1), "solver": "DPMSolverMultistep"}):
        images = with_smile.generate(["a <smile> king"], [1], **options)
        (gradient,) = torch.autograd.grad(images.sum(), list(tokens.vectors))
        assert gradient.abs().max() > 0
    assert not with_smile.generate(["a <smile> king"], [1]).requires_grad
    assert with_smile.generate(["a <smile> king"], [1], solver=EDICT()).shape == (1, 3, 16, 16)


def test_a_negative_prompt_with_a_token_follows_the_token(pipe):
    tokens = bank("<smile>", 0.3)
    against = pipe.with_tokens(tokens).with_sampling(negative_prompt="a <smile>")
    with torch.no_grad():
        before = against.generate(["a king"], [1])
        tokens.set("<smile>", [torch.full((1, 16), -0.3)])
        assert not torch.equal(against.generate(["a king"], [1]), before)
        words = pipe.with_sampling(negative_prompt="a hat")
        assert words.unconditional() is words.unconditional()


@pytest.mark.parametrize(
    ("build", "adapter"), [(tiny_xl_pipeline, "StableDiffusionXL"), (tiny_if_pipeline, "DeepFloydIF")]
)
def test_the_adapter_of_a_family_is_found(tmp_path, build, adapter):
    folder = build(tmp_path / "model")
    pipeline = Pipeline.from_pretrained(str(folder), sampling=Sampling(steps=2))
    assert type(pipeline.backbone).__name__ == adapter
    assert len(pipeline("a king", seeds=[1])) == 1


def test_families_without_an_adapter(tiny_models, tmp_path):
    copy = shutil.copytree(tiny_models / "pipeline", tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "OtherPipeline"}))
    with pytest.raises(UserError, match=r"OtherPipeline.*StableDiffusionPipeline"):
        Pipeline.from_pretrained(str(copy))
    (copy / "model_index.json").write_text("[")
    with pytest.raises(UserError, match=r"model_index\.json"):
        Pipeline.from_pretrained(str(copy))
    with pytest.raises(UserError, match=r"\./nowhere"):
        Pipeline.from_pretrained("./nowhere")


def test_impossible_settings(pipe):
    with pytest.raises(UserError, match=r"pipeline\.steps.* 1, got 0"):
        pipe.generate(["a king"], [0], steps=0)
    with pytest.raises(UserError, match=r"sampling\.steps.* 1, got 0"):
        Sampling(steps=0)
    with pytest.raises(UserError, match=r"warmup_steps 10 .* 5;"):
        Sampling(steps=5, guidance=SEGA(["glasses"]))
    with pytest.raises(UserError, match="not finite"):
        to_images(torch.full((1, 3, 2, 2), float("nan")))


def test_a_concept_with_a_token_that_is_not_loaded_is_refused(pipe):
    with pytest.raises(UserError, match=r"'<hat>' .* is not loaded"):
        pipe.generate_latents(["a man"], [0], rule=SEGA(["a <hat>"]))
