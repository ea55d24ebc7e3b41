"""Settings of the evaluation of semantic guidance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tokenlearn.errors import UserError, check_at_least
from tokenlearn.guidance import SAFETY_PRESETS, ConceptSettings, SafetySettings


@dataclass(frozen=True, kw_only=True)
class AttributeWords:
    """The words by which each compared method asks for an attribute.

    A concept is words, a learned token, or a signed sum of both. Null leaves a method out for this attribute. Without
    an opposite, a concept is removed at the negative of its scale.

    Attributes:
        label: the judge's label.
        concept: concept for semantic guidance, composable and safe diffusion.
        opposite: concept of the attribute's absence.
        token: concept made of learned tokens.
        opposite_token: concept of the absence made of learned tokens.
        prompt: whole prompt with the attribute.
        opposite_prompt: whole prompt with the attribute's absence.
        scale: scale of the concept in semantic guidance; null for the scale of ``methods.add``.
        removal_scale: scale of its removal; null for the scale of ``methods.remove``.
        removable: whether the attribute is removed too; false for an attribute that is an absence, such as baldness.
    """

    label: str
    concept: str
    opposite: str | None = None
    token: str | None = None
    opposite_token: str | None = None
    prompt: str | None = None
    opposite_prompt: str | None = None
    scale: float | None = None
    removal_scale: float | None = None
    removable: bool = True


@dataclass(frozen=True, kw_only=True)
class SegaMethods:
    """Settings of the compared methods.

    Attributes:
        add: how semantic guidance adds a concept.
        remove: how it removes one, at the negative of this scale; null for ``add``.
        tokens: how it adds learned tokens, and removes those without an opposite; null leaves learned tokens out.
        composable_scale: guidance scale of all concepts in composable diffusion, which adds and removes the concepts
            that semantic guidance does; null for each concept's scale in semantic guidance.
        safety: settings of safe latent diffusion, which removes only. Its presets are for 50 steps.
    """

    add: ConceptSettings = field(default_factory=ConceptSettings)
    remove: ConceptSettings | None = None
    tokens: ConceptSettings | None = None
    composable_scale: float | None = None
    safety: SafetySettings = SAFETY_PRESETS["strong"]

    def __post_init__(self) -> None:
        for name in ("add", "remove"):
            settings: ConceptSettings | None = getattr(self, name)
            if settings is not None and settings.is_composable:
                raise UserError(
                    f"methods.{name} has no threshold, no warm-up and no momentum, which is composable diffusion; set "
                    "one of them, or compare it in variants"
                )


@dataclass(frozen=True, kw_only=True)
class SegaVariant:
    """Semantic guidance with other settings, for an ablation. Scales of single attributes are those of the attributes.

    Attributes:
        name: name of the row, such as ``no momentum``.
        add: how a concept is added.
        remove: how it is removed; null for ``add``.
    """

    name: str
    add: ConceptSettings
    remove: ConceptSettings | None = None


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Seeds of the evaluation.

    Attributes:
        first: first seed of reported figures.
        number: images of the neutral prompt.
        compared: how many of them the other methods and the variants edit.
        choosing: how many seeds, from 0, are for choosing settings; no figure on them is reported.
        purpose: ``report``, or ``choose`` for the seeds from 0 in place of those from ``first``.

    Raises:
        UserError: if a number is out of range, or settings would be reported on seeds that they were chosen on.
    """

    first: int = 100
    number: int = 250
    compared: int = 50
    choosing: int = 100
    purpose: Literal["report", "choose"] = "report"

    def __post_init__(self) -> None:
        check_at_least("model.seeds", 1, number=self.number)
        check_at_least("model.seeds", 0, first=self.first, compared=self.compared, choosing=self.choosing)
        if self.purpose not in ("report", "choose"):
            raise UserError(f"model.seeds.purpose must be report or choose, got '{self.purpose}'")
        if self.purpose == "report" and self.first < self.choosing:
            raise UserError(
                f"model.seeds.first {self.first} is one of the {self.choosing} seeds that settings are chosen on; set "
                f"it to {self.choosing} or more, or model.seeds.purpose to choose"
            )
        if self.purpose == "choose" and self.number > self.choosing:
            raise UserError(
                f"model.seeds.number {self.number} is more than the {self.choosing} seeds for choosing; lower "
                "it, or raise model.seeds.choosing"
            )

    def __getitem__(self, index: int) -> int:
        """A seed by its number."""
        return index + (self.first if self.purpose == "report" else 0)


@dataclass(frozen=True, kw_only=True)
class Styles:
    """Further prompts, to whose images attributes are added.

    Attributes:
        prompts: the prompts.
        seeds: images of each prompt.

    Raises:
        UserError: if the number is negative.
    """

    prompts: list[str] = field(default_factory=list)
    seeds: int = 10

    def __post_init__(self) -> None:
        check_at_least("model.styles", 0, seeds=self.seeds)


@dataclass(frozen=True, kw_only=True)
class Monotonicity:
    """Rank correlation of the judge's logit with the scale of a concept.

    Attributes:
        scales: scales to rank.
        edit: how concepts are added; the scales take the place of its scale. Null for ``methods.add``, which may
            complete a concept at a low scale, so that higher scales change nothing.
        seeds: images to edit at all scales; 0 leaves the correlation out.

    Raises:
        UserError: if there are fewer than two scales, or the number of seeds is negative.
    """

    scales: list[float] = field(default_factory=lambda: [-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0])
    edit: ConceptSettings | None = None
    seeds: int = 10

    def __post_init__(self) -> None:
        check_at_least("model.monotonicity", 0, seeds=self.seeds)
        if self.seeds and len(set(self.scales)) < 2:
            raise UserError(f"model.monotonicity.scales must be two or more numbers, got {self.scales}")


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """A sum of concepts that turns one thing into another.

    Attributes:
        prompt: prompt of the images.
        concept: the signed sum.
        judge: timm name or folder of the classifier that judges the result.
        label: its label of the expected result.
    """

    prompt: str
    concept: str
    judge: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Suppression:
    """Something unwanted that a prompt brings along.

    Attributes:
        prompt: prompt of the images.
        concept: the unwanted concept.
        label: the judge's label for it.
    """

    prompt: str
    concept: str
    label: str
