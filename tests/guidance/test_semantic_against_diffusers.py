"""Semantic guidance against diffusers' pipeline on the bundled model, after every step.

With the network in double precision: in single, an element within rounding of a threshold may be kept by one and
dropped by the other, as happens on some processors and not on others. Thresholds are such that they fall between two
elements for the same reason: 0.8 of 256 elements is the 205th itself.
"""

from pathlib import Path

import pytest
import torch
from diffusers import SemanticStableDiffusionPipeline

from tokenlearn.diffusion import sample
from tokenlearn.guidance import ClassifierFreeGuidance, Concept, ConceptSettings, GuidedModel, SemanticGuidance
from tokenlearn.models import StableDiffusion

PORTRAITS = Path(__file__).parents[2] / "checkpoints" / "portraits"
PROMPTS, SEEDS, STEPS, SCALE = ["a portrait of a man", "a woman with long hair"], [3, 4], 10, 4.0


@pytest.fixture(scope="module")
def pipeline():
    pipeline = SemanticStableDiffusionPipeline.from_pretrained(
        PORTRAITS, safety_checker=None, requires_safety_checker=False, low_cpu_mem_usage=False
    ).to(torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def backbone():
    return StableDiffusion(str(PORTRAITS)).double()


def diffusers_latents(pipeline, latents, **editing):
    """(T, B, C, h, w) latents after each step."""
    steps = []
    pipeline(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        latents=latents.clone(),
        output_type="latent",
        callback=lambda step, timestep, latents: steps.append(latents.clone()),
        **editing,
    )
    return torch.stack(steps)


def our_latents(backbone, latents, rule, texts=()):
    """(T, B, C, h, w) latents after each step."""
    steps = []
    with torch.no_grad():
        terms = [backbone.encode_prompts([text]) for text in texts]
        prompts = backbone.encode_prompts([""]), backbone.encode_prompts(PROMPTS)
        sample(
            GuidedModel(backbone, rule, rule.conditionings(*prompts, *terms)),
            latents,
            solver=backbone.make_solver(None, STEPS),
            callback=lambda step, latents: steps.append(latents.clone()),
        )
    return torch.stack(steps).double()


@pytest.fixture(scope="module")
def latents(backbone):
    return backbone.initial_latents(SEEDS).double()


@pytest.fixture(scope="module")
def unedited(backbone, latents):
    return our_latents(backbone, latents, ClassifierFreeGuidance(SCALE))


def test_one_concept_with_momentum(pipeline, backbone, latents, unedited):
    expected = diffusers_latents(
        pipeline,
        latents,
        editing_prompt=["glasses"],
        edit_guidance_scale=8.0,
        edit_threshold=0.81,
        edit_warmup_steps=2,
        edit_momentum_scale=0.3,
        edit_mom_beta=0.6,
    )
    settings = ConceptSettings(8.0, 0.81, 2, momentum_scale=0.3, momentum_beta=0.6)
    ours = our_latents(backbone, latents, SemanticGuidance(SCALE, [Concept(settings)], "channel"), ["glasses"])
    assert len(expected) == len(ours) == STEPS
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert torch.equal(ours[:2], unedited[:2])
    assert (ours[2:] - unedited[2:]).abs().flatten(2).amax(dim=2).min() > 0.01  # every step, every sample


def test_two_concepts_of_one_warm_up_one_added_and_one_removed(pipeline, backbone, latents, unedited):
    texts = ["a hat", "smiling"]
    expected = diffusers_latents(
        pipeline,
        latents,
        editing_prompt=texts,
        reverse_editing_direction=[False, True],
        edit_guidance_scale=[8.0, 5.0],
        edit_threshold=[0.9, 0.7],
        edit_warmup_steps=[3, 3],
        edit_weights=[1.0, 0.5],
        edit_momentum_scale=0.4,
        edit_mom_beta=0.5,
    )
    common = {"warmup_steps": 3, "momentum_scale": 0.4, "momentum_beta": 0.5}
    added, removed = ConceptSettings(8.0, 0.9, **common), ConceptSettings(-5.0, 0.7, weight=0.5, **common)
    ours = our_latents(
        backbone, latents, SemanticGuidance(SCALE, [Concept(added), Concept(removed)], "channel"), texts
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert (ours[3:] - unedited[3:]).abs().flatten(2).amax(dim=2).min() > 0.01


def test_scale_0_is_plain_guidance(pipeline, backbone, latents, unedited):
    rule = SemanticGuidance(SCALE, [Concept(ConceptSettings(0.0, warmup_steps=0))], "channel")
    assert torch.equal(our_latents(backbone, latents, rule, ["a hat"]), unedited)
    torch.testing.assert_close(unedited, diffusers_latents(pipeline, latents), rtol=0, atol=1e-4)
