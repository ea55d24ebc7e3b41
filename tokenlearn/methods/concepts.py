"""Concepts as users write them: words, learned tokens, or signed sums of both, with how they are applied."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tokenlearn.errors import UserError
from tokenlearn.guidance import Concept, ConceptSettings, SemanticGuidance
from tokenlearn.guidance.semantic import ThresholdOver
from tokenlearn.models import Conditioning, DiffusionBackbone

_OPERATOR = re.compile(r"(?:^|(?<=\s))([+-])\s+")
_TOKEN = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True, kw_only=True)
class SemanticEdit(ConceptSettings):
    """A concept and how it is applied; one line of a config: ``{concept: glasses, scale: 6}``.

    Attributes:
        concept: words, a learned token, or a signed sum of these with spaces around the signs, such as
            ``king - male + female``.
        name: what files and captions call the edit; null for the concept, with a minus before it at a negative scale.
    """

    concept: str
    name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_concept(self.concept)

    @property
    def caption(self) -> str:
        """What the edit is called."""
        return self.name or (self.concept if self.scale >= 0 else f"no {self.concept}")


class Term(NamedTuple):
    """One prompt of a concept.

    Attributes:
        sign: 1 or -1.
        prompt: what the network is conditioned on.
    """

    sign: int
    prompt: str


def parse_concept(concept: str) -> list[Term]:
    """The terms of a signed sum: ``king - male + female`` gives ``+king``, ``-male`` and ``+female``.

    A sign has white space after it, and before it unless it is the first; other plus signs and dashes belong to words.

    Raises:
        UserError: if there is no word before, between or after the signs.
    """
    first, *rest = _OPERATOR.split(f"{concept} ")
    signed = list(zip(rest[::2], rest[1::2], strict=True))
    if first.strip() or not signed:
        signed = [("+", first), *signed]
    terms = [Term(1 if sign == "+" else -1, prompt.strip()) for sign, prompt in signed]
    if not all(term.prompt for term in terms):
        raise UserError(f"concept '{concept}' is empty or lacks a word beside a sign; write it like king - male")
    return terms


def check_tokens(concepts: Sequence[str], known: Collection[str]) -> None:
    """Refuse concepts with learned tokens that are not loaded.

    Raises:
        UserError: naming the first.
    """
    for concept in concepts:
        for token in _TOKEN.findall(concept):
            if token not in known:
                raise UserError(
                    f"token '{token}' of concept '{concept}' is not loaded, only {', '.join(known) or 'none'}; give "
                    "its file in model.embeddings, or --ckpt_path"
                )


def check_steps(edits: Sequence[SemanticEdit], num_inference_steps: int) -> None:
    """Refuse edits that would never be applied.

    Raises:
        UserError: if a warm-up takes all steps.
    """
    for edit in edits:
        if edit.warmup_steps >= num_inference_steps:
            raise UserError(
                f"warmup_steps {edit.warmup_steps} of concept '{edit.concept}' leaves none of {num_inference_steps} "
                "steps; give less"
            )


def encode_terms(backbone: DiffusionBackbone, edits: Sequence[SemanticEdit]) -> list[Conditioning]:
    """One row for each term of the first edit, then of the second, and so on."""
    return [backbone.encode_prompts([term.prompt]) for edit in edits for term in parse_concept(edit.concept)]


def semantic_guidance(
    guidance_scale: float,
    edits: Sequence[SemanticEdit],
    threshold_over: ThresholdOver = "tensor",
    sample_scales: Sequence[Tensor | None] | None = None,
    record: bool = False,
) -> SemanticGuidance:
    """The guidance rule of edits, to be given the conditionings of :func:`encode_terms`.

    Args:
        guidance_scale: classifier-free guidance scale of the prompt.
        edits: concepts.
        threshold_over: see :func:`tokenlearn.guidance.tail_mask`.
        sample_scales: per edit, None or (B,) scales of the samples in place of its own.
        record: see :class:`tokenlearn.guidance.SemanticGuidance`.
    """
    scales = [None] * len(edits) if sample_scales is None else sample_scales
    concepts = [
        Concept(edit, [term.sign for term in parse_concept(edit.concept)], own)
        for edit, own in zip(edits, scales, strict=True)
    ]
    return SemanticGuidance(guidance_scale, concepts, threshold_over, record)
