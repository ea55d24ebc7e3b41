"""Model folders that load and give nonsense: each is refused in one line that names the cause."""

import json
import re

import pytest
import timm
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

from tests.diffusion.networks import EMPTY, guided
from tests.edges.model_folders import WEIGHTS, copied, with_json, with_weights
from tests.tiny import tiny_classifier
from tests.tiny_if import tiny_if_pipeline
from tests.tiny_xl import tiny_xl_pipeline
from tokenlearn.errors import UserError
from tokenlearn.models import DeepFloydIF, StableDiffusion, StableDiffusionXL
from tokenlearn.models.classifier import TimmClassifier, save_classifier
from tokenlearn.pipeline import Pipeline

NAMES = ["hat", "beard", "crown"]
LATENTS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
}


def refusal(load):
    with pytest.raises(UserError) as caught:
        load()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


def without_first(weights):
    return {name: weights[name] for name in sorted(weights)[1:]}


def halved(weights):
    return {name: weights[name] for name in sorted(weights)[::2]}


def renamed(weights):
    return {f"network.{name}": tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("part", list(WEIGHTS))
@pytest.mark.parametrize("change", [without_first, halved, renamed])
def test_weights_that_a_file_lacks_are_named(tiny_models, tmp_path, part, change):
    folder = copied(tiny_models / "pipeline", tmp_path / "copy")
    with_weights(folder, WEIGHTS[part], change)
    found = refusal(lambda: StableDiffusion(str(folder)))
    assert f"the files of the {part} of" in found
    assert " lack " in found
    if change is without_first:
        whole = StableDiffusion(str(tiny_models / "pipeline"))
        modules = {"unet": whole.unet, "vae": whole.vae, "text_encoder": whole.text_encoders[0]}
        assert re.search(r"lack ([\w.]+)", found)[1] in modules[part].state_dict()


@pytest.mark.parametrize("part", list(WEIGHTS))
def test_further_weights_in_a_file_are_no_error(tiny_models, tmp_path, part):
    folder = copied(tiny_models / "pipeline", tmp_path / "copy")
    with_weights(folder, WEIGHTS[part], lambda weights: weights | {"training_step": torch.zeros(1)})
    found = StableDiffusion(str(folder)).state_dict()
    for name, tensor in StableDiffusion(str(tiny_models / "pipeline")).state_dict().items():
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    ("make", "load", "parts"),
    [
        (tiny_xl_pipeline, StableDiffusionXL, ["unet", "vae", "text_encoder", "text_encoder_2"]),
        (tiny_if_pipeline, DeepFloydIF, ["unet", "text_encoder"]),
    ],
)
def test_weights_of_other_families(tmp_path, make, load, parts):
    whole = make(tmp_path / "whole")
    load(str(whole))
    for part in parts:
        folder = copied(whole, tmp_path / part)
        with_weights(folder, WEIGHTS[part.removesuffix("_2")].replace("text_encoder", part), without_first)
        assert f"the files of the {part} of" in refusal(lambda folder=folder: load(str(folder)))


def test_files_in_one_variant_alone_name_the_setting(tiny_models, tmp_path):
    folder = copied(tiny_models / "pipeline", tmp_path / "copy")
    for file in WEIGHTS.values():
        path = folder / file
        path.rename(path.with_name(f"{path.stem}.bf16.safetensors"))
    assert "in the variant bf16 alone, not without one; set model.backbone.variant" in refusal(
        lambda: StableDiffusion(str(folder))
    )
    assert "not in fp16" in refusal(lambda: StableDiffusion(str(folder), variant="fp16"))
    StableDiffusion(str(folder), variant="bf16")


def saved_with(folder, tiny_models, unet=None, vae=None):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_models / "pipeline", safety_checker=None)
    if unet is not None:
        pipeline.unet = UNet2DConditionModel.from_config(dict(pipeline.unet.config) | unet)
    if vae is not None:
        pipeline.vae = AutoencoderKL.from_config(dict(pipeline.vae.config) | vae)
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("unet", "vae", "expected"),
    [
        ({"in_channels": 9}, None, "9 channels as for inpainting and gives 4, its VAE has 4"),
        ({"in_channels": 8}, None, "8 channels as of instruct-pix2pix"),
        ({"in_channels": 5}, None, "5 channels as with depth"),
        ({"out_channels": 8}, None, "gives 8, its VAE has 4"),
        (None, {"latent_channels": 16}, "its VAE has 16"),
        ({"time_cond_proj_dim": 8}, None, "time_cond_proj_dim 8"),
        ({"cross_attention_dim": 24}, None, "prompts of width 24, its text encoders give 16"),
        ({"sample_size": None}, None, "no sample_size"),
        (None, {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "mean and deviation of its latents"),
    ],
)
def test_networks_that_take_something_else(tiny_models, tmp_path, unet, vae, expected):
    folder = saved_with(tmp_path / "other", tiny_models, unet, vae)
    assert expected in refusal(lambda: StableDiffusion(folder))


def test_a_refiner_is_of_another_family(tmp_path):
    folder = tiny_xl_pipeline(tmp_path / "refiner")
    with_json(folder, "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    assert "has no 'text_encoder', so it is of another family" in refusal(lambda: StableDiffusionXL(str(folder)))


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_latents_are_not_clipped_by_a_class_that_clips_by_default(tiny_models, tmp_path, scheduler):
    folder = copied(tiny_models / "pipeline", tmp_path / "copy")
    scheduler(**LATENTS).save_pretrained(folder / "scheduler")
    with_json(folder, "model_index.json", scheduler=["diffusers", scheduler.__name__])
    backbone = StableDiffusion(str(folder))
    for name in ("DDIM", "DDPM"):
        assert backbone.make_scheduler(name).config.clip_sample is False
    latents = 3 * backbone.initial_latents([1])
    ddim = backbone.make_solver("DDIM", 1)
    # A network that predicts no noise: one step to t = 0 leaves z / alpha_T, far outside of [-1, 1].
    clean = ddim.sample(
        guided(lambda latents, timestep, conditioning: torch.zeros_like(latents), [EMPTY]),
        latents,
        gradient=None,
        generators=None,
        step_options=None,
        callback=None,
        from_timestep=None,
        to_timestep=None,
    )
    assert clean.abs().max() > 2


def test_pixels_are_clipped_as_the_pipeline_says(tmp_path):
    backbone = DeepFloydIF(str(tiny_if_pipeline(tmp_path / "if")))
    assert backbone.make_scheduler("DDPM").config.clip_sample == backbone._scheduler.config.get("clip_sample", True)


@pytest.mark.parametrize("channels", [1, 4])
def test_classifiers_of_other_channels(tmp_path, channels):
    model = timm.create_model("test_resnet", num_classes=3, in_chans=channels)
    folder = save_classifier(model, tmp_path / "other", NAMES, model_args={"in_chans": channels})
    assert f"images of {channels} channels, not the 3 of RGB" in refusal(lambda: TimmClassifier(str(folder)))


def test_a_head_of_another_size_than_the_files(tmp_path):
    folder = tiny_classifier(tmp_path / "classifier", NAMES)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_args": {"num_classes": 5}}))
    assert "has 5 outputs, but its files have 3, so its last layer would be random" in refusal(
        lambda: TimmClassifier(str(folder))
    )


@pytest.mark.parametrize("change", [without_first, halved, renamed])
def test_weights_that_a_classifier_lacks(tmp_path, change):
    folder = tiny_classifier(tmp_path / "classifier", NAMES)
    with_weights(folder, "model.safetensors", change)
    assert "cannot load the classifier" in refusal(lambda: TimmClassifier(str(folder)))


def test_names_of_outputs_as_a_mapping(tmp_path):
    folder = tiny_classifier(tmp_path / "classifier", NAMES)
    for names in ({"0": "hat", "1": "beard", "2": "crown"}, {"hat": 0, "crown": 2, "beard": 1}):
        with_json(folder, "config.json", label_names=names)
        assert TimmClassifier(str(folder)).label_names == ("hat", "beard", "crown")
    for names in ({"hat": "a"}, 7, "hat", [1, 2, 3]):
        with_json(folder, "config.json", label_names=names)
        assert "no list of names" in refusal(lambda: TimmClassifier(str(folder)))


@pytest.mark.parametrize("std", [[0.0, 0.0, 0.0], [float("nan")] * 3])
def test_normalisation_by_zero(tmp_path, std):
    folder = tiny_classifier(tmp_path / "classifier", NAMES)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["std"] = std
    (folder / "config.json").write_text(json.dumps(config))
    assert "the std above 0" in refusal(lambda: TimmClassifier(str(folder)))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler", "image_encoder"])
def test_code_of_a_model_folder_is_not_run(tiny_models, tmp_path, part):
    folder = copied(tiny_models / "pipeline", tmp_path / "copy")
    (folder / part).mkdir(exist_ok=True)
    ran = tmp_path / "code-of-a-model-folder-ran"
    (folder / part / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    with_json(folder, "model_index.json", **{part: ["evil", "Evil"]})
    for load in (StableDiffusion, Pipeline.from_pretrained):
        assert f"takes '{part}' from 'evil', not from diffusers or transformers" in refusal(
            lambda load=load: load(str(folder))
        )
    assert not ran.exists()


def test_a_class_that_a_library_does_not_have(tiny_models, tmp_path):
    folder = copied(tiny_models / "pipeline", tmp_path / "copy")
    with_json(folder, "model_index.json", scheduler=["diffusers", "DreamScheduler"])
    assert "'DreamScheduler' as 'scheduler', which the installed diffusers does not have" in refusal(
        lambda: StableDiffusion(str(folder))
    )
