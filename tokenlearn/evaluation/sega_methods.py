"""The methods that semantic guidance is compared with, each as a prompt and a guidance rule."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

from tokenlearn.evaluation.sega_settings import AttributeWords, SegaMethods, SegaVariant
from tokenlearn.guidance import (
    SEGA,
    ClassifierFreeGuidance,
    ComposableGuidance,
    ConceptSettings,
    GuidanceRule,
    SafeGuidance,
    SemanticEdit,
    parse_concept,
)

Side = Literal["add", "remove"]

PLAIN, SEMANTIC, TOKENS, PROMPTS, COMPOSABLE, SAFE = METHODS = (
    "plain",
    "semantic guidance",
    "learned tokens",
    "prompt editing",
    "composable",
    "safe",
)


VARIANT = "variant"
"""Method of the records of all variants, whose items tell them apart."""


def variant_item(name: str) -> str:
    """Row of a variant."""
    return f"variant: {name}"


class Request(NamedTuple):
    """A prompt and the guidance rule that images of it are generated with."""

    prompt: str
    rule: GuidanceRule


def edit_requests(
    words: AttributeWords, side: Side, *, prompt: str, guidance_scale: float, methods: SegaMethods
) -> dict[str, Request]:
    """How each method adds or removes an attribute.

    Args:
        words: the attribute.
        side: whether it is added or removed.
        prompt: neutral prompt.
        guidance_scale: classifier-free guidance scale.
        methods: settings of the methods.

    Returns:
        Method to its prompt and rule, without methods that cannot make this edit.
    """
    adding = side == "add"
    requests = {SEMANTIC: Request(prompt, SEGA([semantic_edit(words, side, methods)], guidance_scale))}
    if methods.tokens is not None and words.token is not None:
        edit = _directed(words.token, words.opposite_token, side, methods.tokens)
        requests[TOKENS] = Request(prompt, SEGA([edit], guidance_scale))
    edited_prompt = words.prompt if adding else words.opposite_prompt
    if edited_prompt is not None:
        requests[PROMPTS] = Request(edited_prompt, ClassifierFreeGuidance(guidance_scale))
    requests[COMPOSABLE] = Request(
        prompt, composable_rule(semantic_edit(words, side, methods), guidance_scale, methods)
    )
    if not adding:
        requests[SAFE] = Request(prompt, SafeGuidance(guidance_scale, methods.safety, words.concept))
    return requests


def composable_rule(edit: SemanticEdit, guidance_scale: float, methods: SegaMethods) -> ComposableGuidance:
    """Composable guidance by the terms of an edit, at its scale or at the scale of all.

    Args:
        edit: edit by semantic guidance.
        guidance_scale: classifier-free guidance scale.
        methods: settings of the methods.
    """
    scale = edit.scale
    if methods.composable_scale is not None:
        scale = math.copysign(methods.composable_scale, edit.scale)
    terms = parse_concept(edit.concept)
    scales = [guidance_scale, *(term.sign * scale for term in terms)]
    return ComposableGuidance(scales, [term.prompt for term in terms])


def semantic_edit(words: AttributeWords, side: Side, methods: SegaMethods | SegaVariant) -> SemanticEdit:
    """The edit that adds or removes an attribute by semantic guidance, or by a variant of it."""
    settings = methods.add if side == "add" else methods.remove or methods.add
    scale = words.scale if side == "add" else words.removal_scale
    if scale is not None:
        settings = dataclasses.replace(settings, scale=scale)
    return _directed(words.concept, words.opposite, side, settings)


def concept_edit(concept: str, settings: ConceptSettings, sign: int = 1) -> SemanticEdit:
    """The edit that adds a concept, or with sign -1 removes it."""
    values: dict[str, Any] = dataclasses.asdict(settings)
    return SemanticEdit(concept=concept, **(values | {"scale": sign * settings.scale}))


def _directed(concept: str, opposite: str | None, side: Side, settings: ConceptSettings) -> SemanticEdit:
    if side == "remove" and opposite is not None:
        return concept_edit(opposite, settings)
    return concept_edit(concept, settings, 1 if side == "add" else -1)
