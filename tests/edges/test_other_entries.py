"""Single mistakes that belong to no sweep: packages that are not there, few steps, foreign classifiers, odd names."""

import json
import sys

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from safetensors.torch import save_file

from tests.command_line import error_of
from tests.edges.model_folders import copied, with_json
from tests.edges.test_silent_nonsense_models import LATENTS
from tests.tiny import tiny_classifier
from tokenlearn.errors import UserError
from tokenlearn.files import atomic_write
from tokenlearn.generation import Edit, Sega
from tokenlearn.guidance import SemanticEdit
from tokenlearn.inspection import inspect
from tokenlearn.main import _mistake
from tokenlearn.models import StableDiffusion
from tokenlearn.models.classifier import TimmClassifier
from tokenlearn.pipeline import Pipeline, Sampling
from tokenlearn.tokens import save_embedding
from tokenlearn.tokens.files.writing import file_names


@pytest.mark.parametrize(("name", "package"), [("DPMSolverSDE", "torchsde"), ("LMSDiscrete", "scipy")])
def test_schedulers_of_packages_that_are_not_installed(tiny_models, monkeypatch, name, package):
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    try:
        backbone.make_solver(name, 3)
    except Exception as error:  # what is tested for
        line = str(_mistake(error))
        assert "None" not in line
        assert package in line
        assert "install" in line
    else:
        pytest.skip(f"this version of diffusers makes {name} without {package}")


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_few_steps_with_a_start_by_runge_kutta(tiny_models, tmp_path, steps):
    folder = copied(tiny_models / "pipeline", tmp_path / "copy")
    PNDMScheduler(**LATENTS, skip_prk_steps=False).save_pretrained(folder / "scheduler")
    with_json(folder, "model_index.json", scheduler=["diffusers", "PNDMScheduler"])
    backbone = StableDiffusion(str(folder))
    if steps < 4:  # its start by Runge-Kutta takes four
        with pytest.raises(UserError, match=rf"cannot make {steps} steps .*change sampling\.steps"):
            backbone.make_solver(None, steps)
    else:
        assert len(backbone.make_solver(None, steps).timesteps) >= steps


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
@pytest.mark.parametrize("saved", [DDPMScheduler, DPMSolverMultistepScheduler, DDIMScheduler])
def test_a_variance_that_no_network_predicts(tiny_models, tmp_path, saved, kind):
    def images(config, solver):
        folder = copied(tiny_models / "pipeline", tmp_path / str(len(list(tmp_path.iterdir()))))
        saved.from_config(config).save_pretrained(folder / "scheduler")
        with_json(folder, "model_index.json", scheduler=["diffusers", saved.__name__])
        settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        assert settings.get("variance_type") == config.get("variance_type", settings.get("variance_type"))
        pipe = Pipeline(StableDiffusion(str(folder)), sampling=Sampling(solver=solver, steps=3))
        return pipe.generate(["a man"], seeds=[1])

    for solver in (None, "DDPM", "DPMSolverMultistep"):
        found = images({**LATENTS, "variance_type": kind}, solver)
        assert torch.equal(found, images(LATENTS, solver))


@pytest.mark.parametrize("name", ["shirt.pth", "model_best.pth.tar", "model.ckpt", "model.safetensors", "folder"])
def test_classifiers_of_other_programs(tmp_path, name):
    path = tmp_path / name
    weights = {"fc.weight": torch.zeros(2, 3)}
    if name == "folder":
        path.mkdir()
        torch.save(weights, path / "model.pth")
    elif name.endswith(".safetensors"):
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights}, path)
    with pytest.raises(UserError) as caught:
        TimmClassifier(str(path))
    assert "does not exist" not in str(caught.value)
    assert "set architecture" in str(caught.value)
    assert "config.json" in str(caught.value)


def test_a_classifier_of_transformers(tmp_path):
    folder = tiny_classifier(tmp_path / "guide", ["a", "b"])
    config = {"architectures": ["ViTForImageClassification"], "model_type": "vit", "id2label": {"0": "a", "1": "b"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        TimmClassifier(str(folder))
    assert "timm" in str(caught.value)
    assert "download" not in str(caught.value)
    assert "ViTForImageClassification" in str(caught.value)


@pytest.mark.parametrize("name", ["..", ".", "???", "../.."])
def test_names_that_make_no_folder(tiny_models, name):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    with pytest.raises(UserError, match=r"model\.edits .* letters or digits"):
        Sega(backbone, edits=[SemanticEdit(concept=name, warmup_steps=0)], prompts=["a man"])


def test_an_edit_named_like_the_images_without_one(tiny_models):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    with pytest.raises(UserError, match=r"model\.edits has one of the name 'before'"):
        Sega(backbone, edits=[SemanticEdit(concept="before", warmup_steps=0)], prompts=["a man"])


@pytest.mark.parametrize("option", ["barebones", "enable_checkpointing"])
def test_settings_of_the_trainer_that_cannot_be(tiny_config, capsys, option):
    value = "true" if option == "barebones" else "false"
    line = error_of(["fit", "--config", tiny_config(), f"--trainer.{option}", value], capsys)
    assert option in line


def test_names_that_are_too_long_for_a_file_are_refused_at_once(tiny_models, tmp_path):
    long = "hat " * 80
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    calls = {
        "the edit of model.edits": lambda: Sega(
            backbone, edits=[SemanticEdit(concept=long, warmup_steps=0)], prompts=["a man"]
        ),
        "the edit": lambda: Edit(
            backbone, prompts=["a man"], edits=[{f"<{letter * 90}>": 1.5 for letter in ("a", "b", "c")}]
        ),
        "the token of": lambda: file_names([f"<{'a' * 300}>"]),
    }
    for words, call in calls.items():
        with pytest.raises(UserError, match=rf"{words}.* gives a file name of \d+ bytes.*; give a shorter name"):
            call()
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UserError, match="give a shorter name"), atomic_write(folder / ("a" * 300)):
        pass


def test_inspecting_a_file_whose_model_has_an_impossible_name(tmp_path, capsys):
    about = {"base_model": "m" * 100_000, "vocabulary_hash": "x"}
    inspect([str(save_embedding(tmp_path / "b.safetensors", "<b>", [torch.ones(1, 16)], about))])
    page = capsys.readouterr().out
    assert "<b>" in page
    assert max(map(len, page.splitlines())) < 400


def test_edits_of_semantic_guidance_as_in_yaml(tiny_models):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    task = Sega(backbone, edits=[{"concept": "hat", "warmup_steps": 0}], prompts=["a man"])
    assert task.edits == [SemanticEdit(concept="hat", warmup_steps=0)]
