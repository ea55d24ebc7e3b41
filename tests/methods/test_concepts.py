import pytest
import torch

from tokenlearn.errors import UserError
from tokenlearn.methods.concepts import (
    SemanticEdit,
    check_steps,
    check_tokens,
    encode_terms,
    parse_concept,
    semantic_guidance,
)
from tokenlearn.models import StableDiffusion


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
    with pytest.raises(UserError, match=r"token '<hat>' of concept 'a <hat>' is not loaded, only <smile>; give its f"):
        check_tokens(["<smile>", "a <hat>"], ["<smile>"])
    check_steps([SemanticEdit(concept="hat", warmup_steps=9)], 10)
    with pytest.raises(UserError, match=r"warmup_steps 10 of concept 'hat' leaves none of 10 steps"):
        check_steps([SemanticEdit(concept="hat", warmup_steps=10)], 10)


@torch.no_grad()
def test_terms_go_to_the_guidance_with_their_signs(tiny_models):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    options = {"threshold": None, "warmup_steps": 0, "momentum_scale": 0.0}
    edits = [SemanticEdit(concept="a - red", scale=2.0, **options), SemanticEdit(concept="portrait", **options)]
    terms = encode_terms(backbone, edits)
    assert [len(term) for term in terms] == [1, 1, 1]
    assert torch.equal(terms[1].prompt_embeds, backbone.encode_prompts(["red"]).prompt_embeds)
    scales = torch.tensor([0.0, 3.0])
    rule = semantic_guidance(4.0, edits, sample_scales=[None, scales])
    empty, prompt, a, red, portrait = torch.randn(5, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    guided = rule([empty, prompt, a, red, portrait], 0)
    expected = empty + 4 * (prompt - empty) + 2 * (a - red) + scales.view(2, 1, 1, 1) * (portrait - empty)
    torch.testing.assert_close(guided, expected)
