import pytest
import torch
import yaml
from PIL import Image, ImageChops
from safetensors.torch import load_file

from tokenlearn.diffusion import sample
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance
from tokenlearn.main import main
from tokenlearn.methods import Sega
from tokenlearn.methods.concepts import SemanticEdit, encode_terms, semantic_guidance
from tokenlearn.models import StableDiffusion
from tokenlearn.tokens import save_embedding

EARLY = {"warmup_steps": 1, "momentum_scale": 0.2}
EDITS = [SemanticEdit(concept="red", scale=4.0, **EARLY), SemanticEdit(concept="a - hat", scale=-3.0, **EARLY)]


@pytest.fixture
def make(tiny_models):
    def task(**options):
        settings = {"prompts": ["a portrait", "red"], "seeds": [3, 5], "edits": EDITS, "num_inference_steps": 4}
        return Sega(StableDiffusion(str(tiny_models / "pipeline")), **(settings | options))

    return task


def write_config(path, tiny_models, settings):
    backbone = {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_models / "pipeline")}}
    model = {"class_path": "Sega", "init_args": {"backbone": backbone, "num_inference_steps": 4} | settings}
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}
    path.write_text(yaml.safe_dump({"model": model, "trainer": trainer}))
    return str(path)


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index, size in enumerate([(30, 20), (16, 16)]):
        pixels = torch.randint(0, 255, (size[1], size[0], 3), generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.byte().numpy()).save(folder / f"{index}.png")
    return folder


@torch.no_grad()
def test_columns_are_plain_each_edit_and_all_together(make):
    task = make()
    assert task.captions == ["red", "no a - hat", "all"]
    assert task.edit_names == ["red", "no-a---hat", "all"]
    edited = task.predict_step([task.pictures[index] for index in range(4)])
    backbone = task.backbone
    for column, (own, picture) in ((0, (EDITS[:1], 1)), (1, (EDITS[1:], 2)), (2, (EDITS, 3))):
        rule = semantic_guidance(task.guidance.guidance_scale, own)
        seed, prompt = task.pictures[picture].seed, task.pictures[picture].prompt
        latents = sample(
            backbone,
            task.scheduler,
            backbone.initial_latents([seed]),
            rule.conditionings(
                *[backbone.encode_prompts([text]) for text in ("", prompt)], *encode_terms(backbone, own)
            ),
            rule,
            4,
        )
        image = backbone.decode_latents(latents)[0].clamp(0, 1)
        torch.testing.assert_close(edited[picture].edits[column], image, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(edited[picture].edits[column], edited[picture].before, atol=1e-3)
    plain = ClassifierFreeGuidance(task.guidance.guidance_scale)
    texts = [backbone.encode_prompts([text]) for text in ("", "red")]
    start = backbone.initial_latents([5])
    latents = sample(backbone, task.scheduler, start, plain.conditionings(*texts), plain, 4)
    torch.testing.assert_close(edited[3].before, backbone.decode_latents(latents)[0].clamp(0, 1), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_learned_tokens_are_concepts(make, tmp_path):
    path = tmp_path / "smile.safetensors"
    task = make()
    save_embedding(path, "<smile>", [torch.ones(1, task.backbone.embedding_widths[0])], {})
    edit = SemanticEdit(concept="<smile>", **EARLY)
    learned = make(embeddings=[str(path)], edits=[edit])
    learned.on_predict_start()
    (one,) = learned.predict_step([learned.pictures[0]])
    assert one.edits.shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match=r"token '<smile>' of concept '<smile>' is not loaded"):
        make(edits=[edit]).on_predict_start()


@torch.no_grad()
@pytest.mark.parametrize("inversion", ["edit_friendly", "leapfrog"])
def test_photographs_come_back_where_no_concept_acts(make, photographs, inversion):
    nothing = SemanticEdit(concept="red", scale=0.0, name="nothing", **EARLY)
    settings = {"prompts": [], "images": str(photographs), "timestep": 501, "inversion": inversion}
    task = make(**settings, edits=[nothing, EDITS[0]], together=False)
    for picture in (task.pictures[0], task.pictures[1]):
        (edited,) = task.predict_step([picture])
        latents = task.backbone.encode_images(picture.image)
        round_trip = task.backbone.decode_latents(latents).clamp(0, 1)[0]
        torch.testing.assert_close(edited.edits[0], round_trip, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(edited.edits[1], round_trip, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"edits": []}, r"set either model.edits, such as \{concept: glasses\}, or model.recorded_guidance"),
        ({"prompts": []}, r"set either model.images"),
        ({"edits": [EDITS[0], EDITS[0]]}, r"model.edits has two of the name 'red'"),
        (
            {"edits": [SemanticEdit(concept="red", warmup_steps=4)]},
            r"warmup_steps 4 of concept 'red' leaves none of 4",
        ),
        ({"record_guidance": True}, r"record_guidance takes one prompt, got 2"),
        ({"edits": [], "recorded_guidance": "/nowhere"}, r"folder '/nowhere' has no recorded guidance"),
        ({"batch_size": 0}, r"model.batch_size must be at least 1"),
    ],
)
def test_bad_settings(make, options, words):
    with pytest.raises(UserError, match=words):
        make(**options)


@pytest.mark.parametrize(
    "options",
    [{"threshold": 0.0}, {"threshold": 1.0}, {"warmup_steps": -1}, {"concept": " "}, {"scale": float("nan")}],
)
def test_bad_edits(options):
    with pytest.raises(UserError):
        SemanticEdit(**({"concept": "red"} | options))


def test_predict_leaves_a_contact_sheet_and_guidance_to_use_again(tiny_models, tmp_path, capsys):
    settings = {
        "prompts": ["a portrait"],
        "seeds": [3, 5],
        "edits": [{"concept": "red", "scale": 4.0, **EARLY}, {"concept": "hat", "scale": -3.0, **EARLY}],
        "record_guidance": True,
    }
    config = write_config(tmp_path / "sega.yaml", tiny_models, settings)
    main(["predict", "--config", config, "--output_dir", str(tmp_path / "run")])
    run = tmp_path / "run"
    names = ["000-a-portrait-seed3.png", "000-a-portrait-seed5.png"]
    for folder in ("before", "red", "no-hat", "all"):
        assert sorted(path.name for path in (run / "images" / folder).iterdir()) == names
    assert Image.open(run / "contact_sheet.png").width > 4 * 100
    vectors = load_file(run / "guidance" / "red" / "seed5.safetensors")["guidance"]
    assert vectors.shape == (4, 4, 8, 8)
    assert not vectors[0].any()  # the warm-up
    assert vectors[1].any()

    settings |= {"edits": [], "record_guidance": False, "recorded_guidance": str(run / "guidance")}
    config = write_config(tmp_path / "again.yaml", tiny_models, settings)
    main(["predict", "--config", config, "--output_dir", str(tmp_path / "again")])
    for name in names:  # the same prompt and seed: the recorded guidance gives the same picture
        first, second = (Image.open(tmp_path / part / "images" / "red" / name) for part in ("run", "again"))
        assert max(high for _, high in ImageChops.difference(first, second).getextrema()) <= 1
