"""The bundled models are what their users expect to find."""

from pathlib import Path

import pytest
import timm
from diffusers import StableDiffusionPipeline

from data_prep.portrait_arrays import PORTRAIT_LABELS
from tokenlearn.data.portraits import PERSONA_LABELS
from tokenlearn.models import StableDiffusion, TimmClassifier
from tokenlearn.tokens import load_bank, vocabulary_hash

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
CLASSIFIERS = ["attribute_guide", "attribute_judge", "persona_guide", "persona_judge"]


def test_size():
    assert sum(path.stat().st_size for path in CHECKPOINTS.rglob("*") if path.is_file()) <= 64 * 2**20


@pytest.mark.parametrize("name", ["portraits", *CLASSIFIERS])
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


@pytest.mark.parametrize("folder", ["class_tokens", "attribute_tokens"])
def test_tokens_are_those_of_the_pipeline(folder):
    backbone = StableDiffusion(str(CHECKPOINTS / "portraits"))
    paths = sorted(map(str, (CHECKPOINTS / folder).glob("*.safetensors")))
    bank, files = load_bank(paths, backbone.embedding_widths, vocabulary_hash(backbone.text_encoders[0]))
    assert len(bank.placeholders) == len(paths) >= 3
    for file in files:
        assert file.metadata["vocabulary_hash"] == vocabulary_hash(backbone.text_encoders[0])
        assert file.metadata["prompt"].startswith(file.token)
