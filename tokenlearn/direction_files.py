"""The command ``tokenlearn directions``: embedding files of directions, from pairs of prompts alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tokenlearn.errors import UserError, check_template
from tokenlearn.pipeline import Pipeline
from tokenlearn.tokens import LearnedTokens
from tokenlearn.tokens.directions import Positions, direction


@dataclass(frozen=True)
class PromptPairs:
    """Descriptions with and without an attribute.

    Attributes:
        positive: descriptions with the attribute, such as ``smiling person``.
        negative: the same descriptions without it, in the same order, such as ``serious person``.
    """

    positive: list[str] = field(default_factory=list)
    negative: list[str] = field(default_factory=list)


def directions(
    pretrained: str,
    directions: dict[str, PromptPairs],
    *,
    templates: list[str] = ["{}"],  # noqa: B006 - read only; a list is what YAML shows
    positions: Positions = "all",
    output_dir: str = "embeddings",
) -> list[Path]:
    """Write tokens of the output space from pairs of prompts, without training, one file for each token.

    Args:
        pretrained: model: folder of a diffusers pipeline, or hub id.
        directions: token to its pairs of descriptions.
        templates: prompts with ``{}`` where a description goes; every pair is put into each.
        positions: positions of the text encoder's output that directions are measured at and added to: ``all``, or
            ``content``, from the first content token on.
        output_dir: folder of the files, which are named after the tokens.

    Returns:
        Paths of the files.

    Raises:
        UserError: if there is no direction, a template lacks its ``{}``, or see
            :func:`tokenlearn.tokens.directions.direction`.
    """
    if not directions:
        raise UserError("directions is empty; give a token with its pairs, as configs/directions/portraits.yaml does")
    for template in templates:
        check_template(template, "templates", "description")
    pipeline = Pipeline.from_pretrained(pretrained)
    tokens: LearnedTokens | None = None
    for token, pairs in directions.items():
        try:
            found = direction(
                pipeline,
                positive=[template.format(text) for template in templates for text in pairs.positive],
                negative=[template.format(text) for template in templates for text in pairs.negative],
                token=token,
                positions=positions,
            )
        except UserError as error:
            raise UserError(f"directions.{token}: {error}") from error
        tokens = found if tokens is None else tokens | found
    assert tokens is not None
    pipeline.with_tokens(tokens)  # refuses names that are words of the vocabulary
    written = tokens.save(output_dir)
    for path in written:
        print(path)
    return written
