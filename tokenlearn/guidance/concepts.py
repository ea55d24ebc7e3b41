"""Concepts as users write them: words, learned tokens, or signed sums of both, with their settings."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tokenlearn.errors import UserError
from tokenlearn.guidance.semantic import (
    Concept,
    ConceptSettings,
    MomentumAfter,
    SemanticGuidance,
    ThresholdOver,
    check_warmup,
)

_OPERATOR = re.compile(r"(?:^|(?<=\s))([+-])\s+")
_TOKEN = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True, kw_only=True)
class SemanticEdit(ConceptSettings):
    """A concept and its settings; one line of a config: ``{concept: glasses, scale: 6}``.

    Attributes:
        concept: words, a learned token, or a signed sum of these with spaces around the signs, such as
            ``king - male + female``.
        name: name of the edit in files and captions; null for the concept, with "no" before it at a negative scale.
    """

    concept: str
    name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_concept(self.concept)

    @property
    def caption(self) -> str:
        """Name of the edit for people."""
        return self.name or (self.concept if self.scale >= 0 else f"no {self.concept}")


class Term(NamedTuple):
    """One prompt of a concept.

    Attributes:
        sign: 1 or -1.
        prompt: prompt that the network is conditioned on.
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


class SEGA(SemanticGuidance):
    """Semantic guidance (Brack et al., NeurIPS 2023, https://arxiv.org/abs/2301.12247) by concepts as words.

    Args:
        edits: concepts with their settings; in Python, words alone have the default settings.
        guidance_scale: ``s_g``, classifier-free guidance scale of the prompt.
        scale: ``s_e`` of the concepts that are given as words; null for the default.
        threshold_over: what thresholds are taken over, see :func:`tokenlearn.guidance.tail_mask`.
        record: keep the total guidance of every step.
        sample_scales: per edit, None or (B,) scales of the samples in place of the edit's scale.
        momentum_after: ``own_warmup`` adds a concept's momentum with the concept; ``all_warmups`` once the warm-ups of
            all concepts are over, as in the paper.

    Attributes:
        edits: the edits.

    Raises:
        UserError: if there are no edits, a concept cannot be read, or a number is out of range.
    """

    def __init__(
        self,
        edits: list[SemanticEdit | str],
        guidance_scale: float = 7.5,
        scale: float | None = None,
        threshold_over: ThresholdOver = "tensor",
        record: bool = False,
        sample_scales: Sequence[Tensor | None] | None = None,
        momentum_after: MomentumAfter = "own_warmup",
    ) -> None:
        if isinstance(edits, str | Mapping):
            raise UserError(f"SEGA's edits {edits!r} are not a list; write them like ['glasses']")
        if not edits:
            raise UserError("SEGA has no edits; give one, such as {concept: glasses, scale: 6}")
        self.edits = [_with_settings(edit, scale) for edit in edits]
        scales = [None] * len(edits) if sample_scales is None else sample_scales
        terms = [parse_concept(edit.concept) for edit in self.edits]
        concepts = [
            Concept(edit, [term.sign for term in parsed], of_samples)
            for edit, parsed, of_samples in zip(self.edits, terms, scales, strict=True)
        ]
        super().__init__(guidance_scale, concepts, threshold_over, record, momentum_after)
        self._prompts = tuple(term.prompt for parsed in terms for term in parsed)

    @property
    def concept_prompts(self) -> Sequence[str]:
        """See :class:`tokenlearn.guidance.GuidanceRule`: the terms of the first concept, then of the second."""
        return self._prompts

    def check_steps(self, steps: int) -> None:
        """Refuse a number of steps that a warm-up takes entirely.

        Raises:
            UserError: naming the concept.
        """
        for edit in self.edits:
            check_warmup(edit.warmup_steps, steps, f"concept '{edit.concept}'")


def _with_settings(edit: SemanticEdit | str, scale: float | None) -> SemanticEdit:
    if isinstance(edit, SemanticEdit):
        return edit
    plain = SemanticEdit(concept=edit)
    return plain if scale is None else dataclasses.replace(plain, scale=scale)


def check_tokens(prompts: Sequence[str], known: Collection[str]) -> None:
    """Refuse prompts or concepts with tokens that are not loaded.

    Whatever is in angle brackets is a token, with weights of other programs around it too, as in ``(<hat>:1.2)``. To a
    text encoder, a token that it does not know is a few letters.

    Raises:
        UserError: naming the first, and the nearest of those that are loaded.
    """
    names = {name.casefold(): name for name in known}
    for prompt in prompts:
        for token in _TOKEN.findall(prompt):
            if any(token.casefold() in name for name in names):  # upper and lower case are the same in prompts
                continue
            near = difflib.get_close_matches(token.casefold(), names, n=1)
            hint = f"; did you mean '{names[near[0]]}'?" if near else ""
            more = f" and {len(names) - 12} more" if len(names) > 12 else ""
            loaded = f"loaded are {', '.join(list(known)[:12])}{more}" if known else "no token is"
            raise UserError(
                f"token '{token}' of '{prompt}' is not loaded{hint}; {loaded}: give its file in model.embeddings, or "
                "--ckpt_path"
            )
