"""The bundled models are what their users expect to find."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from diffusers import StableDiffusionPipeline
from torchmetrics.functional.regression import spearman_corrcoef

from data_prep.portrait_arrays import PORTRAIT_LABELS
from data_prep.train_clip import absence_prompt
from tokenlearn.data.pixels import unit_range
from tokenlearn.data.portraits import ATTRIBUTES, PERSONA_LABELS, attribute_prompt, portrait
from tokenlearn.models import StableDiffusion, TimmClassifier
from tokenlearn.models.aesthetic import AestheticHead
from tokenlearn.models.clip import ClipModel
from tokenlearn.tokens import load_bank, vocabulary_hash

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
CLASSIFIERS = ["attribute_guide", "attribute_judge", "persona_guide", "persona_judge"]
CLIPS = ["clip_guide", "clip_judge"]
AESTHETIC_HEADS = ["aesthetic_guide", "aesthetic_judge"]


def test_size():
    assert sum(path.stat().st_size for path in CHECKPOINTS.rglob("*") if path.is_file()) <= 64 * 2**20


@pytest.mark.parametrize("name", ["portraits", *CLASSIFIERS, *CLIPS, *AESTHETIC_HEADS])
def test_model_card(name):
    assert "%" in (CHECKPOINTS / name / "README.md").read_text()


def test_pipeline_loads_as_any_stable_diffusion():
    pipe = StableDiffusionPipeline.from_pretrained(CHECKPOINTS / "portraits")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a portrait of a woman", num_inference_steps=2).images[0].size == (64, 64)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(name):
    classifier = TimmClassifier(str(CHECKPOINTS / name))
    assert classifier.label_names == (PORTRAIT_LABELS if name.startswith("attribute") else PERSONA_LABELS)
    assert classifier.multi_label == name.startswith("attribute")
    model = timm.create_model(f"local-dir:{CHECKPOINTS / name}", pretrained=True)
    assert model.num_classes == len(classifier.label_names)


@pytest.mark.parametrize("task", ["attribute", "persona"])
def test_guide_and_judge_differ(task):
    guide, judge = (TimmClassifier(str(CHECKPOINTS / f"{task}_{role}")) for role in ("guide", "judge"))
    assert type(guide.model) is not type(judge.model)


@pytest.fixture(scope="module")
def drawn():
    """Scenes of ordinary people in a stream that trained nothing, and their images (B, 3, H, W) in [0, 1]."""
    portraits = [portrait(31337, index)[:2] for index in range(200)]
    ordinary = [(scene, image) for scene, image in portraits if scene.persona is None]
    images = unit_range([torch.from_numpy(np.array(image)) for _, image in ordinary])
    return [scene for scene, _ in ordinary], images


@torch.no_grad()
@pytest.mark.parametrize("name", CLIPS)
def test_clips_tell_attributes_by_prompts(name, drawn):
    scenes, images = drawn
    clip = ClipModel(str(CHECKPOINTS / name))
    prompts = [prompt(attribute) for prompt in (attribute_prompt, absence_prompt) for attribute in ATTRIBUTES]
    present, absent = (clip.image_features(images) @ clip.text_features(prompts).T).chunk(2, dim=1)
    shown = torch.tensor([[scene.has(attribute) for attribute in ATTRIBUTES] for scene in scenes])
    assert ((present > absent) == shown).float().mean() >= 0.9


@torch.no_grad()
@pytest.mark.parametrize("name", AESTHETIC_HEADS)
def test_aesthetic_heads_rank_as_the_true_rating(name, drawn):
    scenes, images = drawn
    scores = AestheticHead(str(CHECKPOINTS / name)).score(images)
    assert spearman_corrcoef(scores, torch.tensor([scene.rating for scene in scenes])) >= 0.8


def test_clips_differ():
    guide, judge = (ClipModel(str(CHECKPOINTS / name)).model.config.vision_config.hidden_size for name in CLIPS)
    assert guide != judge


@pytest.mark.parametrize("folder", ["class_tokens", "attribute_tokens"])
def test_tokens_are_those_of_the_pipeline(folder):
    backbone = StableDiffusion(str(CHECKPOINTS / "portraits"))
    paths = sorted(map(str, (CHECKPOINTS / folder).glob("*.safetensors")))
    bank, files = load_bank(paths, backbone.embedding_widths, backbone.word_tables)
    assert len(bank.placeholders) == len(paths) >= 3
    for file in files:
        assert file.metadata["vocabulary_hash"] == vocabulary_hash(backbone.text_encoders[0])
        assert file.metadata["prompt"].startswith(file.token)
        assert file.path.stem == f"{file.token.strip('<>')}-tl"  # the word of five programs, and no other word
