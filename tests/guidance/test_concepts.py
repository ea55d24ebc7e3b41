import pytest
import torch

from tokenlearn.errors import UserError
from tokenlearn.guidance import SEGA, SemanticEdit, check_tokens, parse_concept


@pytest.mark.parametrize(
    ("concept", "terms"),
    [
        ("glasses", [(1, "glasses")]),
        ("king - male + female", [(1, "king"), (-1, "male"), (1, "female")]),
        ("- male", [(-1, "male")]),
        ("+ a semi-long beard", [(1, "a semi-long beard")]),
        ("<no-smile> - <hat>", [(1, "<no-smile>"), (-1, "<hat>")]),
        ("rock+roll", [(1, "rock+roll")]),
    ],
)
def test_concepts_are_signed_sums(concept, terms):
    assert parse_concept(concept) == terms


@pytest.mark.parametrize("concept", ["", "  ", "king -", "- ", "king - - male", "+ + a"])
def test_empty_concepts(concept):
    with pytest.raises(UserError, match=r"is empty or lacks a word beside a sign"):
        SemanticEdit(concept=concept)


def test_captions():
    assert SemanticEdit(concept="hat").caption == "hat"
    assert SemanticEdit(concept="hat", scale=-5).caption == "no hat"
    assert SemanticEdit(concept="king - male", name="queen").caption == "queen"


def test_tokens_and_steps_are_checked():
    check_tokens(["<smile> - hat", "x < y"], ["<smile>"])
    with pytest.raises(UserError, match=r"'<hat>' of 'a <hat>' .* <smile>"):
        check_tokens(["<smile>", "a <hat>"], ["<smile>"])
    SEGA([SemanticEdit(concept="hat", warmup_steps=9)]).check_steps(10)
    with pytest.raises(UserError, match=r"warmup_steps 10 .*'hat'.* 10;"):
        SEGA([SemanticEdit(concept="hat", warmup_steps=10)]).check_steps(10)


def test_words_alone_are_concepts_with_the_default_settings():
    rule = SEGA(["glasses", SemanticEdit(concept="hat", scale=2.0)], scale=8.0)
    assert [(edit.concept, edit.scale) for edit in rule.edits] == [("glasses", 8.0), ("hat", 2.0)]
    assert rule.concept_prompts == ("glasses", "hat")
    with pytest.raises(UserError, match="SEGA"):
        SEGA([])


def test_terms_go_to_the_guidance_with_their_signs():
    options = {"threshold": None, "warmup_steps": 0, "momentum_scale": 0.0}
    edits = [SemanticEdit(concept="a - red", scale=2.0, **options), SemanticEdit(concept="portrait", **options)]
    scales = torch.tensor([0.0, 3.0])
    rule = SEGA(edits, 4.0, sample_scales=[None, scales])
    assert rule.concept_prompts == ("a", "red", "portrait")
    empty, prompt, a, red, portrait = torch.randn(5, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    guided = rule(rule.conditionings(empty, prompt, a, red, portrait), 0)
    expected = empty + 4 * (prompt - empty) + 2 * (a - red) + scales.view(2, 1, 1, 1) * (portrait - empty)
    torch.testing.assert_close(guided, expected)


@pytest.mark.parametrize("edits", ["glasses", {"concept": "glasses"}])
def test_edits_that_are_not_a_list_are_refused(edits):
    with pytest.raises(UserError, match=r"glasses.* are not a list"):
        SEGA(edits)
