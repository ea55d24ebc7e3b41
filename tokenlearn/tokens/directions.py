"""Directions without training: the difference of two means of a text encoder's outputs.

Pairs of prompts differ in one attribute, such as "a portrait of a smiling person" and "a portrait of a serious
person". The mean of the encoder's outputs for the first minus that for the second is a direction, which added to the
outputs for any prompt moves the image towards the attribute. Neither images nor a classifier are needed, and it takes
seconds. It is the cheapest rival of learned tokens (diffusion-sliders, NeurIPS 2026).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tokenlearn.errors import UserError, check_template
from tokenlearn.tokens.bank import TokenBank
from tokenlearn.tokens.compatibility import VOCABULARY, fingerprint
from tokenlearn.tokens.embeddings import LearnedTokens
from tokenlearn.tokens.spaces import Space

if TYPE_CHECKING:
    from tokenlearn.pipeline import Pipeline

Positions = Literal["all", "content"]
"""Positions of the encoder's output that a direction is measured at and added to: all, padding included, or from the
first content token on."""

_SPACES: dict[Positions, Space] = {"all": "output", "content": "output_content"}
_BATCH = 32


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction in the outputs of text encoders, with its natural unit of strength.

    Attributes:
        vector: (D,) of norm 1, the widths of all encoders side by side.
        projections: means of the negatives' and of the positives' projections on the vector.
        strengths: lowest and highest strength that the prompts themselves reach, in natural units: from the mean of
            the positives down to the lowest negative, and from the mean of the negatives up to the highest positive.
        pairs: number of pairs of prompts.
    """

    vector: Tensor
    projections: tuple[float, float]
    strengths: tuple[float, float]
    pairs: int

    @property
    def unit(self) -> float:
        """The natural unit of strength: from the mean of the negatives to that of the positives."""
        return self.projections[1] - self.projections[0]


def difference_of_means(positive: Tensor, negative: Tensor) -> Direction:
    """The normalised difference of two means, and the projections on it.

    Args:
        positive: (n, D) encoded prompts with the attribute.
        negative: (n, D) encoded prompts without it, in the same order.

    Raises:
        UserError: if both means are the same.
    """
    difference = positive.mean(dim=0) - negative.mean(dim=0)
    unit = difference.norm()
    if not unit > 1e-6 * positive.norm(dim=1).mean():
        raise UserError(
            "the positive and the negative prompts have the same mean, so they give no direction; write prompts that "
            "differ in the attribute"
        )
    vector = difference / unit
    above, below = positive @ vector, negative @ vector
    low, high = float(below.mean()), float(above.mean())
    reached = (float(below.min()) - high) / float(unit), (float(above.max()) - low) / float(unit)
    return Direction(vector, (low, high), reached, len(positive))


def find_direction(
    pipeline: Pipeline, positive: Sequence[str], negative: Sequence[str], positions: Positions = "all"
) -> Direction:
    """The direction between two lists of prompts.

    Args:
        pipeline: frozen model; its tokens may stand in the prompts.
        positive: prompts with the attribute.
        negative: the same prompts without it.
        positions: positions of the encoders' outputs whose mean is taken.

    Raises:
        UserError: if there are no prompts, not as many negatives as positives, or both have the same mean.
    """
    if isinstance(positive, str) or isinstance(negative, str):
        raise UserError("positive and negative are lists of prompts; write ['a smiling person'] with brackets")
    if not positive or len(positive) != len(negative):
        raise UserError(
            f"a direction needs as many negative prompts as positive ones, at least one, got {len(positive)} positive "
            f"and {len(negative)} negative; write them as pairs that differ in the attribute alone"
        )
    means = [mean_outputs(pipeline, prompts, _SPACES[positions]) for prompts in (positive, negative)]
    return difference_of_means(*means)


@torch.no_grad()
def mean_outputs(pipeline: Pipeline, prompts: Sequence[str], space: Space = "output") -> Tensor:
    """Mean of the encoders' outputs over the positions of a space: (n, D) for n prompts.

    Args:
        pipeline: frozen model.
        prompts: n prompts.
        space: ``output`` or ``output_content``.
    """
    means = []
    for start in range(0, len(prompts), _BATCH):
        states = pipeline.encode(prompts[start : start + _BATCH]).prompt_embeds
        mask = pipeline.backbone.output_mask(states.shape[1], space)
        means.append((states * mask).sum(dim=1) / mask.sum(dim=0))
    return torch.cat(means).float()


def vectors_of_outputs(pipeline: Pipeline, words: str, space: Space) -> list[Tensor]:
    """Vectors (1, width) for each encoder, from the mean output for the empty prompt to that for words.

    A token of the output space that has these vectors is, alone in a prompt and in the mean over positions, the words.

    Args:
        pipeline: frozen model.
        words: word or words.
        space: ``output`` or ``output_content``.
    """
    empty, shown = mean_outputs(pipeline, ["", words], space)
    return parts_of(shown - empty, pipeline)


def direction(
    pipeline: Pipeline,
    *,
    positive: Sequence[str],
    negative: Sequence[str],
    token: str,
    positions: Positions = "all",
) -> LearnedTokens:
    """A token of the output space from pairs of prompts, without any training.

    The token adds one natural unit, from the mean of the negatives to that of the positives, so strengths are about
    those of learned tokens.

    Args:
        pipeline: frozen model.
        positive: prompts with the attribute, such as ``["a smiling person", "a photo of a smiling woman"]``.
        negative: the same prompts without it.
        token: the token as used in prompts, such as ``<smile>``.
        positions: positions of the encoders' outputs that the direction is measured at and added to.

    Returns:
        The token; several are put together by ``|``.

    Raises:
        UserError: see :func:`find_direction` and :class:`TokenBank`.
    """
    found = find_direction(pipeline, positive, negative, positions)
    bank = TokenBank({token: 1}, pipeline.backbone.output_widths, {token: _SPACES[positions]})
    bank.set(token, parts_of(found.unit * found.vector, pipeline))
    return LearnedTokens(bank, {token: direction_metadata(found, pipeline, token)})


def parts_of(vector: Tensor, pipeline: Pipeline) -> list[Tensor]:
    """A vector (D,) as one of (1, width) for each encoder."""
    return list(torch.split(vector[None], list(pipeline.backbone.output_widths), dim=1))


def direction_metadata(found: Direction, pipeline: Pipeline, token: str) -> dict[str, str]:
    """Entries of the file of a direction besides its vectors.

    Args:
        found: the direction.
        pipeline: the model that it is of.
        token: its token, of whose name the file keeps sketches.
    """
    return {
        "kind": "direction",
        "method": "difference of means",
        "base_model": pipeline.backbone.pretrained,
        "vocabulary_hash": pipeline.vocabulary_hash,
        VOCABULARY: fingerprint(pipeline.backbone.word_tables, token),
        "pairs": str(found.pairs),
        "projections": json.dumps([round(number, 6) for number in found.projections]),
        "strengths": json.dumps([round(number, 4) for number in found.strengths]),
    }


@dataclass(frozen=True)
class PairTemplates:
    """How pairs of prompts are made from one prompt for each class.

    Attributes:
        templates: prompts with ``{}``. The first is the one that the prompts of the classes are written in, such as
            ``a portrait of {}``; what stands in its place is put into the others too.
        neutral: prompt for a class that has none, in the first template, such as ``a portrait of a person``.

    Raises:
        UserError: if there is no template, or one lacks its ``{}``.
    """

    templates: list[str] = field(default_factory=lambda: ["{}"])
    neutral: str | None = None

    def __post_init__(self) -> None:
        if not self.templates:
            raise UserError("directions.templates is empty; give one, such as 'a portrait of {}'")
        for template in self.templates:
            check_template(template, "directions.templates", "description")

    def pairs(self, class_name: str, others: Sequence[str], prompts: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """Positive and negative prompts for a class against the other classes of its attribute, in every template.

        Args:
            class_name: the class.
            others: the other classes.
            prompts: class to its prompt. The neutral prompt stands for a class without one, and for the others if
                none of them has one.

        Raises:
            UserError: if there is no prompt for either side, or a prompt is not written in the first template.
        """
        named = list(dict.fromkeys(prompts[other] for other in others if other in prompts))
        opposites = named or [text for text in [self.neutral] if text is not None]
        shown = prompts.get(class_name, self.neutral)
        if shown is None or not opposites or shown in opposites:
            raise UserError(
                f"a direction for class '{class_name}' needs a prompt for it or for {', '.join(others)}, and "
                f"directions.neutral for the other side; prompts are given for {', '.join(prompts) or 'none'}"
            )
        descriptions = [
            (self._description(shown), self._description(opposite)) for opposite in opposites if opposite is not None
        ]
        pairs = [
            (template.format(one), template.format(other))
            for template in self.templates
            for one, other in descriptions
        ]
        positive, negative = zip(*pairs, strict=True)
        return list(positive), list(negative)

    def _description(self, prompt: str) -> str:
        """What stands in a prompt where the first template has ``{}``."""
        before, after = self.templates[0].split("{}")
        if len(prompt) <= len(before) + len(after) or not (prompt.startswith(before) and prompt.endswith(after)):
            raise UserError(
                f"the prompt '{prompt}' is not written like the first of directions.templates, '{self.templates[0]}'; "
                "change one of them"
            )
        return prompt[len(before) : len(prompt) - len(after)]


def class_directions(
    pipeline: Pipeline,
    attributes: Sequence[Sequence[str]],
    prompts: Mapping[str, str],
    templates: PairTemplates,
    positions: Positions = "all",
) -> Iterator[tuple[str, Direction]]:
    """Each class of attributes with its direction, see :meth:`PairTemplates.pairs`.

    Args:
        pipeline: frozen model.
        attributes: the classes of each attribute.
        prompts: class to a prompt that asks for it.
        templates: how pairs are made.
        positions: positions of the encoders' outputs whose mean is taken.
    """
    for class_names in attributes:
        for name in class_names:
            others = [other for other in class_names if other != name]
            yield name, find_direction(pipeline, *templates.pairs(name, others, prompts), positions)
