import pytest
import torch
import yaml
from PIL import Image, ImageChops
from safetensors.torch import load_file

from tokenlearn.diffusion import EDICT, OBELM, Leapfrog, sample
from tokenlearn.editing import Editing
from tokenlearn.errors import UserError
from tokenlearn.generation import Sega
from tokenlearn.guidance import SEGA, ClassifierFreeGuidance, GuidedModel, SemanticEdit
from tokenlearn.main import main
from tokenlearn.models import StableDiffusion
from tokenlearn.pipeline import Sampling
from tokenlearn.tokens import save_embedding

EARLY = {"warmup_steps": 1, "momentum_scale": 0.2}
EDITS = [SemanticEdit(concept="red", scale=4.0, **EARLY), SemanticEdit(concept="a - hat", scale=-3.0, **EARLY)]


@pytest.fixture
def make(tiny_models):
    def task(**options):
        settings = {"prompts": ["a portrait", "red"], "seeds": [3, 5], "edits": EDITS, "sampling": Sampling(4)}
        return Sega(StableDiffusion(str(tiny_models / "pipeline")), **(settings | options))

    return task


def write_config(path, tiny_models, settings):
    backbone = {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_models / "pipeline")}}
    model = {"class_path": "Sega", "init_args": {"backbone": backbone, "sampling": {"steps": 4}} | settings}
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}
    path.write_text(yaml.safe_dump({"model": model, "trainer": trainer}))
    return str(path)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, size in enumerate([(30, 20), (16, 16)]):
        pixels = torch.randint(0, 255, (size[1], size[0], 3), generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.byte().numpy()).save(folder / f"{index}.png")
    return folder


def reference(backbone, rule, seed, *prompts):
    """An image under a rule, without the task and its pipeline."""
    encoded = [backbone.encode_prompts([prompt]) for prompt in ("", *prompts)]
    model = GuidedModel(backbone, rule, rule.conditionings(*encoded))
    latents = sample(model, backbone.initial_latents([seed]), solver=backbone.make_solver(None, 4))
    return backbone.decode_latents(latents)[0].clamp(0, 1)


@torch.no_grad()
def test_columns_are_plain_each_edit_and_all_together(make):
    task = make()
    assert task.plan.captions == {"red": "red", "no-a---hat": "no a - hat", "all": "all"}
    results = task.predict_step([task.images[index] for index in range(4)])
    for column, (edits, terms, index) in enumerate(
        [(EDITS[:1], ["red"], 1), (EDITS[1:], ["a", "hat"], 2), (EDITS, ["red", "a", "hat"], 3)]
    ):
        given, result = task.images[index], results[index]
        image = reference(task.backbone, SEGA(edits, 7.5), given.seed, given.prompt, *terms)
        torch.testing.assert_close(result.edits[column], image, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(result.edits[column], result.before, atol=1e-3)
    plain = reference(task.backbone, ClassifierFreeGuidance(7.5), 5, "red")
    torch.testing.assert_close(results[3].before, plain, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_learned_tokens_are_concepts(make, tmp_path):
    path = tmp_path / "smile.safetensors"
    task = make()
    save_embedding(path, "<smile>", [torch.ones(1, task.backbone.embedding_widths[0])], {})
    edit = SemanticEdit(concept="<smile>", **EARLY)
    learned = make(embeddings=str(path), edits=[edit])
    learned.on_predict_start()
    (result,) = learned.predict_step([learned.images[0]])
    assert result.edits.shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match=r"'<smile>'.*not loaded"):
        make(edits=[edit]).on_predict_start()


@torch.no_grad()
@pytest.mark.parametrize("inversion", ["edit_friendly", Leapfrog()], ids=str)
def test_photos_come_back_where_no_concept_acts(make, photos, inversion):
    nothing = SemanticEdit(concept="red", scale=0.0, name="nothing", **EARLY)
    settings = {"prompts": [], "images": str(photos), "editing": Editing(501, 4, inversion)}
    task = make(**settings, edits=[nothing, EDITS[0]], together=False)
    for photo in (task.images[0], task.images[1]):
        (result,) = task.predict_step([photo])
        latents = task.backbone.encode_images(photo.image)
        round_trip = task.backbone.decode_latents(latents).clamp(0, 1)[0]
        torch.testing.assert_close(result.edits[0], round_trip, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(result.edits[1], round_trip, atol=1e-2)


@pytest.mark.parametrize("inversion", [EDICT(), OBELM()], ids=str)
def test_photos_need_one_evaluation_a_step(make, photos, inversion):
    with pytest.raises(UserError, match=rf"model.editing.inversion {type(inversion).__name__} .*Leapfrog"):
        make(images=str(photos), editing=Editing(501, 4, inversion))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"edits": []}, r"model.edits.* model.recorded_guidance"),
        ({"prompts": []}, r"model.images.* model.prompts"),
        ({"edits": [EDITS[0], EDITS[0]]}, r"model.edits .*'red'"),
        ({"edits": [SemanticEdit(concept="red", warmup_steps=4)]}, r"warmup_steps 4 .*'red'.* 4;"),
        ({"record_guidance": True}, r"record_guidance .* 2"),
        ({"edits": [], "recorded_guidance": "/nowhere"}, r"'/nowhere'"),
        ({"batch_size": 0}, r"model.batch_size .* 0"),
        ({"sampling": Sampling(4, SEGA(EDITS))}, r"model.sampling.guidance .*SEGA"),
    ],
)
def test_bad_settings(make, options, words):
    with pytest.raises(UserError, match=words):
        make(**options)


def test_recordings_are_of_seeds(make, photos):
    with pytest.raises(UserError, match=r"recorded for seeds"):
        make(images=str(photos), record_guidance=True)


def test_the_warm_up_of_photos_must_end_within_their_steps(make, photos):
    # Two of the four steps are made.
    with pytest.raises(UserError, match=r"warmup_steps 2 .* 2;"):
        make(
            images=str(photos),
            edits=[SemanticEdit(concept="red", warmup_steps=2)],
            editing=Editing(251, 4, "edit_friendly"),
        )


@pytest.mark.parametrize(
    "options",
    [{"threshold": 0.0}, {"threshold": 1.0}, {"warmup_steps": -1}, {"concept": " "}, {"scale": float("nan")}],
)
def test_bad_edits(options):
    with pytest.raises(UserError):
        SemanticEdit(**({"concept": "red"} | options))


def test_predict_leaves_a_contact_sheet_and_guidance_to_use_again(tiny_models, tmp_path):
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
    for name in names:  # the same prompt and seed: the recorded guidance gives the same image
        first, second = (Image.open(tmp_path / part / "images" / "red" / name) for part in ("run", "again"))
        assert max(high for _, high in ImageChops.difference(first, second).getextrema()) <= 1
