import pytest
import torch

from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance, ComposableGuidance

EMPTY, PROMPT, HAT, SMILE = torch.randn(4, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def guided(scales, *conditionals):
    guidance = ComposableGuidance(scales)
    return guidance(guidance.conditionings(EMPTY, *conditionals), 0)


def test_sum_of_signed_directions():
    expected = EMPTY + 7.5 * (PROMPT - EMPTY) + 3 * (HAT - EMPTY) - 2 * (SMILE - EMPTY)
    torch.testing.assert_close(guided([7.5, 3, -2.0], PROMPT, HAT, SMILE), expected)


def test_one_term_is_classifier_free_guidance():
    assert torch.equal(guided([4.0], PROMPT), ClassifierFreeGuidance(4.0)([EMPTY, PROMPT], 0))
    torch.testing.assert_close(guided([1.0], PROMPT), PROMPT)


def test_each_sample_has_its_own_scale():
    scales = torch.tensor([-3.0, 0.0, 5.0])
    together = guided([scales, 2.0], HAT, SMILE)
    for index, scale in enumerate(scales):
        alone = guided([scale.item(), 2.0], HAT, SMILE)
        torch.testing.assert_close(together[index], alone[index])


def test_opposite_scales_move_opposite_ways():
    torch.testing.assert_close(guided([3.0], HAT) - EMPTY, EMPTY - guided([-3.0], HAT))


@pytest.mark.parametrize(
    ("scales", "evaluated"),
    [
        ([0, 2.0, 0.0], ["empty", "hat"]),
        ([torch.tensor([0.0, 1.0]), torch.zeros(2), torch.tensor(-1.0)], ["empty", "prompt", "smile"]),
        ([0, 0, 0], ["empty"]),
    ],
)
def test_terms_without_a_scale_are_not_evaluated(scales, evaluated):
    guidance = ComposableGuidance(scales)
    assert guidance.conditionings("empty", "prompt", "hat", "smile") == evaluated
    predictions = {"empty": EMPTY[:2], "prompt": PROMPT[:2], "hat": HAT[:2], "smile": SMILE[:2]}
    expected = EMPTY[:2].clone()
    for name, scale in zip(("prompt", "hat", "smile"), scales, strict=True):
        expected += torch.as_tensor(scale, dtype=torch.float32).reshape(-1, 1, 1, 1) * (predictions[name] - EMPTY[:2])
    torch.testing.assert_close(guidance([predictions[name] for name in evaluated], 0), expected)


def test_impossible_scales_are_refused():
    with pytest.raises(UserError, match="nan"):
        ComposableGuidance([float("nan")])
    with pytest.raises(UserError, match=r"\[\[1.0, 1.0\]"):
        ComposableGuidance([torch.ones(2, 2)])
    with pytest.raises(ValueError, match="1 conditions for 2 guidance scales"):
        ComposableGuidance([1.0, 2.0]).conditionings("empty", "prompt")


def test_concepts_are_prompts_with_their_scales():
    rule = ComposableGuidance([7.5, 3.0, 0.0], ["a hat", "a beard"])
    assert rule.concept_prompts == ("a hat", "a beard")
    assert rule.conditionings("empty", "prompt", "hat", "beard") == ["empty", "prompt", "hat"]
    with pytest.raises(UserError, match=r"2 scales .* 2 concepts"):
        ComposableGuidance([7.5, 3.0], ["a hat", "a beard"])
