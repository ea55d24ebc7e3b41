import dataclasses
from itertools import pairwise

import pytest
import torch

from tokenlearn.diffusion import sample
from tokenlearn.errors import UserError
from tokenlearn.guidance import (
    SAFETY_PRESETS,
    ClassifierFreeGuidance,
    GuidedModel,
    SafeGuidance,
    SafetySettings,
    safely_guided,
    safety_guidance,
    safety_scale,
)
from tokenlearn.models import StableDiffusion

STEPS, BATCH, SHAPE = 6, 3, (4, 4, 5)
SETTINGS = SafetySettings(4.0, 0.1, 2, 0.5, 0.7)


def predictions(steps=STEPS, batch=BATCH):
    """(T, 3, B, C, h, w): what a network might say at each step to empty prompt, prompt and unwanted concept."""
    return torch.randn(steps, 3, batch, *SHAPE, generator=torch.Generator().manual_seed(0))


def guided(rule, outputs):
    return torch.stack([rule([output[index] for index in rule.needed(i)], i) for i, output in enumerate(outputs)])


def plain(guidance_scale, outputs):
    return outputs[:, 0] + guidance_scale * (outputs[:, 1] - outputs[:, 0])


def test_scale_grows_with_the_difference_up_to_1_and_is_0_above_the_threshold():
    difference = torch.tensor([-2.0, -0.5, -0.1, 0.0, 0.05, 0.2, 0.3, 2.0])
    scale = safety_scale(difference + 7, torch.tensor(7.0), scale=3.0, threshold=0.25)
    torch.testing.assert_close(scale, torch.tensor([1.0, 1.0, 0.3, 0.0, 0.15, 0.6, 0.0, 0.0]), rtol=1e-4, atol=1e-5)


def test_at_the_threshold_nothing_is_done():
    assert safety_scale(torch.tensor(0.5), torch.tensor(0.25), 4.0, 0.25) == 0


def test_guidance_and_guided_prediction():
    empty, prompt, unwanted = torch.tensor([[1.0], [3.0], [2.5]])
    guidance = safety_guidance(empty, unwanted, torch.tensor([0.4]))
    torch.testing.assert_close(guidance, torch.tensor([0.6]))
    torch.testing.assert_close(safely_guided(empty, prompt, 5.0, guidance), torch.tensor([1 + 5 * (2 - 0.6)]))


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("momentum_scale", [0.0, 0.5])
def test_equals_the_papers_equations_number_by_number(guidance_scale, momentum_scale):
    settings = dataclasses.replace(SETTINGS, momentum_scale=momentum_scale)
    outputs = predictions()
    results = guided(SafeGuidance(guidance_scale, settings), outputs)
    for element in torch.randint(results[0].numel(), (20,), generator=torch.Generator().manual_seed(0)).tolist():
        momentum = 0.0
        for step, output in enumerate(outputs.flatten(2)[:, :, element].tolist()):
            empty, prompt, unwanted = output
            scale = min(1.0, 4.0 * abs(prompt - unwanted)) if prompt - unwanted < 0.1 else 0.0
            guidance = scale * (unwanted - empty) + momentum_scale * momentum
            momentum = 0.7 * momentum + 0.3 * guidance
            expected = empty + guidance_scale * (prompt - empty - (guidance if step >= 2 else 0))
            assert results[step].flatten()[element].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_moves_away_from_the_concept():
    empty, prompt = torch.zeros(1, *SHAPE), torch.full((1, *SHAPE), 0.5)
    unwanted = torch.ones(1, *SHAPE)
    rule = SafeGuidance(2.0, SafetySettings(1000.0, 0.01, 0, 0.0, 0.0))
    torch.testing.assert_close(rule([empty, prompt, unwanted], 0), torch.full((1, *SHAPE), 2 * (0.5 - 1)))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_scale_0_is_classifier_free_guidance(guidance_scale):
    rule, expected = SafeGuidance(guidance_scale, SafetySettings(0.0)), ClassifierFreeGuidance(guidance_scale)
    for step, output in enumerate(predictions()):
        chosen = [output[index] for index in rule.needed(step)]
        assert torch.equal(rule(chosen, step), expected(expected.conditionings(output[0], output[1]), step))


def test_only_what_matters_is_needed():
    without = dataclasses.replace(SETTINGS, momentum_scale=0.0)
    assert SafeGuidance(4.0).conditionings("empty", "prompt", "pipe") == ["empty", "prompt", "pipe"]
    assert [SafeGuidance(4.0, without).needed(step) for step in range(4)] == [[0, 1]] * 2 + [[0, 1, 2]] * 2
    assert [SafeGuidance(1.0, without).needed(step) for step in range(4)] == [[1]] * 2 + [[0, 1, 2]] * 2
    assert SafeGuidance(4.0, SETTINGS).needed(0) == [0, 1, 2]  # momentum is gathered from step 0
    assert SafeGuidance(4.0, dataclasses.replace(SETTINGS, scale=0.0)).needed(5) == [0, 1]
    assert torch.equal(guided(SafeGuidance(4.0, SETTINGS), predictions())[:2], plain(4.0, predictions())[:2])


def test_batch_equals_samples_one_by_one_and_nothing_is_left_from_another_call():
    outputs, rule = predictions(), SafeGuidance(4.0, SETTINGS)
    together = guided(rule, outputs)
    for index in range(BATCH):
        torch.testing.assert_close(guided(rule, outputs[:, :, index : index + 1])[:, 0], together[:, index])


def test_gradient_reaches_earlier_steps_through_the_momentum():
    outputs = torch.zeros(2, 3, 1, *SHAPE)
    outputs[:, 2] = 10.0  # the scale is 1 everywhere
    outputs.requires_grad_()
    settings = dataclasses.replace(SETTINGS, warmup_steps=0)
    guided(SafeGuidance(4.0, settings), outputs)[1].sum().backward()
    torch.testing.assert_close(outputs.grad[0, 2], torch.full((1, *SHAPE), -4 * 0.5 * 0.3))
    torch.testing.assert_close(outputs.grad[1, 2], torch.full((1, *SHAPE), -4.0))


def test_samples_with_the_network(tiny_models):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))

    def run(rule, *prompts):
        conditionings = rule.conditionings(*(backbone.encode_prompts([text]) for text in prompts))
        model = GuidedModel(backbone, rule, conditionings)
        return sample(model, backbone.initial_latents([1, 2]), solver=backbone.make_solver("DDIM", 4))

    with torch.no_grad():
        unguarded = run(ClassifierFreeGuidance(4.0), "", "a man with hat")
        guarded = run(SafeGuidance(4.0, SafetySettings(5000, 1.0, 1)), "", "a man with hat", "hat")
        late = run(SafeGuidance(4.0, SafetySettings(5000, 1.0, 9)), "", "a man with hat", "hat")
    assert guarded.isfinite().all()
    assert not torch.allclose(guarded, unguarded, atol=1e-2)
    torch.testing.assert_close(late, unguarded, rtol=1e-4, atol=1e-4)


def test_presets_grow_stronger():
    presets = list(SAFETY_PRESETS.values())
    assert list(SAFETY_PRESETS) == ["weak", "medium", "strong", "max"]
    assert SafetySettings() == SAFETY_PRESETS["medium"]
    for weaker, stronger in pairwise(presets):
        assert weaker.scale < stronger.scale
        assert weaker.threshold < stronger.threshold
        assert weaker.warmup_steps > stronger.warmup_steps


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale": -1.0}, "scale of safety guidance must be a number of at least 0, got -1.0"),
        ({"scale": float("inf")}, "scale"),
        ({"threshold": float("nan")}, "threshold of safety guidance must be a finite number, got nan"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"momentum_scale": 2.0}, r"momentum_scale must be in \[0, 1\], got 2.0"),
        ({"momentum_beta": 1.0}, r"momentum_beta must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_settings_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        SafetySettings(**changes)


def test_impossible_guidance_scale_is_refused():
    with pytest.raises(UserError, match="guidance_scale must be a finite number, got inf"):
        SafeGuidance(float("inf"))


def test_the_warm_up_must_leave_a_step():
    SafeGuidance(4.0, SETTINGS).check_steps(3)
    SafeGuidance(4.0, dataclasses.replace(SETTINGS, scale=0.0)).check_steps(2)
    with pytest.raises(UserError, match=r"warmup_steps 2 .*SafeGuidance.* 2;"):
        SafeGuidance(4.0, SETTINGS).check_steps(2)
