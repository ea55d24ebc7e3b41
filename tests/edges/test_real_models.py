"""What models of the hub bring along: half-precision files alone, schedulers of distilled models, small memory."""

import huggingface_hub
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline

from tests.edges.model_folders import WEIGHTS, copied, with_json
from tests.tiny import tiny_classifier
from tests.training.runs import fit
from tokenlearn.data import PromptDataModule
from tokenlearn.diffusion import LastK
from tokenlearn.errors import UserError
from tokenlearn.models import StableDiffusion
from tokenlearn.objectives import ClassifierLoss
from tokenlearn.pipeline import Pipeline, Sampling
from tokenlearn.tokens.settings import TokenSettings
from tokenlearn.training import Caso, ClassTokens, WordSearch


def renamed_to(variant, folder):
    for file in WEIGHTS.values():
        path = folder / file
        path.rename(path.with_name(f"{path.stem}.{variant}.safetensors"))
    return folder


@pytest.fixture
def hub(tiny_models, tmp_path, monkeypatch):
    """Stand in for the hub by a folder of half-precision files; gives the variants that were downloaded."""
    folder = renamed_to("fp16", copied(tiny_models / "pipeline", tmp_path / "hub"))
    downloaded = []

    def download(pretrained, variant=None, **options):
        downloaded.append(variant)
        return folder

    def names(pretrained, revision=None):
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    monkeypatch.setattr(StableDiffusionPipeline, "download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", names)
    return downloaded


def test_a_hub_model_of_half_precision_files_needs_no_variant(hub):
    StableDiffusion("owner/name")
    assert hub == ["fp16"]


def test_a_hub_that_cannot_be_asked_is_asked_for_the_plain_files(hub, monkeypatch):
    def fails(pretrained, revision=None):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fails)
    StableDiffusion("owner/name")  # what is in the cache
    assert hub == [None]


@pytest.mark.parametrize("name", ["LCM", "TCD", "lcm", "LCMScheduler"])
def test_schedulers_of_distilled_models(tiny_models, name):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    assert backbone.make_scheduler(name).config.clip_sample is False
    pipe = Pipeline(backbone, sampling=Sampling(steps=4, solver=name, guidance=1.0))
    first, again = (pipe.generate(["a man"], [seed]) for seed in (1, 1))
    assert torch.equal(first, again)
    assert first.isfinite().all()
    assert not torch.equal(first, pipe.generate(["a man"], [2]))
    with pytest.raises(UserError, match=r"cannot make 60 steps .*change sampling\.steps"):
        Pipeline(backbone, sampling=Sampling(steps=60, solver=name)).generate(["a man"], [1])


def test_edits_by_a_pipeline_that_was_saved_with_a_distilled_scheduler(tiny_models, tmp_path):
    plain = StableDiffusion(str(tiny_models / "pipeline"))
    folder = copied(tiny_models / "pipeline", tmp_path / "lcm")
    LCMScheduler.from_config(plain.make_scheduler().config).save_pretrained(folder / "scheduler")
    with_json(folder, "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    distilled = StableDiffusion(str(folder))
    found, expected = (model.make_editing_solver(5) for model in (distilled, plain))
    assert found.timesteps == expected.timesteps
    assert torch.equal(found.scheduler.alphas_cumprod, expected.scheduler.alphas_cumprod)
    for name in ("DDIM", "Euler", "TCD"):
        distilled.make_scheduler(name)


def test_a_scheduler_of_other_noise_levels_is_neither_taken_nor_offered(tiny_models):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    for name in ("EDMEuler", "FlowMatchEuler"):
        with pytest.raises(UserError, match="did you mean") as caught:
            backbone.make_scheduler(name)
        assert "EDM" not in str(caught.value).partition(";")[2]


@pytest.mark.parametrize(
    ("dtype", "given", "expected"),
    [
        ("float32", None, torch.float32),
        ("bfloat16", None, torch.bfloat16),
        ("float16", None, torch.float32),
        ("bfloat16", "float32", torch.float32),
    ],
)
def test_classifiers_of_caso_follow_the_precision_of_the_backbone(tiny_models, tmp_path, dtype, given, expected):
    guide = tiny_classifier(tmp_path / "guide", ["smile", "hat"], multi_label=True)
    judge = tiny_classifier(tmp_path / "judge", ["smile", "hat"], multi_label=True)
    backbone = StableDiffusion(str(tiny_models / "pipeline"), dtype=dtype)
    task = Caso(backbone, str(guide), {"smile": None}, judge=str(judge), dtype=given)
    for classifier in (task.classifier, task.judge):
        assert {parameter.dtype for parameter in classifier.model.parameters()} == {expected}
        assert classifier(torch.rand(1, 3, 16, 16)).dtype == torch.float32


@pytest.mark.parametrize(("precision", "expected"), [("32-true", False), ("bf16-mixed", True)])
def test_the_search_for_words_runs_as_the_training_does(tiny_models, monkeypatch, precision, expected):
    backbone, seen = StableDiffusion(str(tiny_models / "pipeline")), []
    real = Pipeline.generate

    def generate(self, *args, **options):
        seen.append(torch.is_autocast_enabled("cpu"))
        return real(self, *args, **options)

    monkeypatch.setattr(Pipeline, "generate", generate)
    task = ClassTokens(
        backbone,
        ["wizard"],
        ClassifierLoss(str(tiny_models / "guide")),
        tokens=TokenSettings(initial_words=None),
        search=WordSearch(words=4, steps=1),
        sampling=Sampling(steps=2),
        gradient=LastK(1),
    )
    data = PromptDataModule(["a {}"], batch_size=1, batches_per_epoch=1, validation_images=1, test_images=1)
    fit(task, data, max_steps=1, precision=precision)
    assert len(seen) > 4
    assert set(seen[:4]) == {expected}
