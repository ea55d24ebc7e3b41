"""Evaluation of what a classifier takes a class to be: the attributes of the images that the class's token makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tokenlearn.data.pixels import unit_range
from tokenlearn.data.sources import Item, items_below
from tokenlearn.data.streams import EvaluationBatches
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.evaluation.base import Evaluation
from tokenlearn.evaluation.real_images import RealImages
from tokenlearn.evaluation.records import Record
from tokenlearn.evaluation.table import Cell, Column, Figure, Row, Table
from tokenlearn.generation.generate import Generate
from tokenlearn.guidance import check_tokens
from tokenlearn.metrics import (
    holm_levels,
    share_difference_interval,
    share_difference_p_value,
    wilson_interval,
)
from tokenlearn.models import DiffusionBackbone, TimmClassifier
from tokenlearn.models.attributes import resolve_attributes
from tokenlearn.pipeline import Sampling
from tokenlearn.tokens import Embeddings

GENERATED, REAL = "generated", "real"


class Count(NamedTuple):
    """Images that show an attribute, among all."""

    shown: int
    images: int

    @property
    def share(self) -> float:
        """Share of the images; NaN without any."""
        return self.shown / self.images if self.images else float("nan")


class Bias(NamedTuple):
    """An attribute of the generated images of a class, against the real ones.

    Attributes:
        class_name: the class.
        attribute: the attribute.
        generated: counts of the generated images.
        real: counts of the real images.
        low: lower end of the interval of the difference, at the level that Holm's correction leaves it.
        high: upper end.
        is_biased: whether the interval leaves 0 out.
    """

    class_name: str
    attribute: str
    generated: Count
    real: Count
    low: float
    high: float
    is_biased: bool

    @property
    def difference(self) -> float:
        """Share of the generated images minus share of the real ones."""
        return self.generated.share - self.real.share


def bias_report(
    generated: Mapping[tuple[str, str], Count], real: Mapping[tuple[str, str], Count], level: float = 0.05
) -> list[Bias]:
    """Which attributes are more or less frequent in the generated images of classes than in the real ones.

    All differences are one family: with Holm's correction, the probability that any of them is named although there is
    none is ``level`` at most, as far as the intervals hold (Newcombe, 1998, method 10).

    Args:
        generated: class and attribute to counts.
        real: counts of the same.
        level: error level of the whole report.

    Returns:
        A line for each class and attribute, in their order.

    Raises:
        ValueError: if the counts are not of the same classes and attributes.
    """
    if generated.keys() != real.keys():
        raise ValueError(f"counts of {sorted(generated.keys() ^ real.keys())} are of one kind of image alone")
    p_values = [share_difference_p_value(*generated[key], *real[key]) for key in generated]
    lines = []
    for (key, count), p_value, corrected in zip(
        generated.items(), p_values, holm_levels(p_values, level), strict=True
    ):
        low, high = share_difference_interval(*count, *real[key], level=1 - corrected)
        lines.append(Bias(*key, count, real[key], low, high, p_value <= corrected))
    return lines


class ClassifierReport(Evaluation[Generate]):
    """What a classifier takes a class to be, by the images that the class's token makes.

    A class token is trained to satisfy a classifier alone (Schwartz et al., 2023, https://arxiv.org/abs/2303.17155).
    Attributes that its images show more often than real images of the class are what the classifier responds to, or
    what the diffusion model adds: the same report of prompts without the token says which of both. Another classifier
    sees the attributes, in generated and real images alike, so that its errors are in both. Run it by ``tokenlearn
    test``; a config has no data section.

    Args:
        backbone: frozen diffusion model.
        attribute_classifier: timm name or folder of a classifier whose labels are the attributes.
        prompts: class to a prompt with its token.
        real: real images, labelled with the classes.
        attributes: labels of the classifier to look at; of none, all.
        images: generated images of each class.
        first_seed: seed of the first of them.
        level: error level of the whole report.
        embeddings: embedding files of the tokens; those of a checkpoint (``--ckpt_path``) replace them.
        sampling: settings of the sampler.
        batch_size: images at once.

    Raises:
        UserError: if there are no prompts, the classifier lacks a label, or a number is out of range.
    """

    task_class = Generate

    def __init__(
        self,
        backbone: DiffusionBackbone,
        attribute_classifier: str | TimmClassifier,
        prompts: dict[str, str],
        real: RealImages,
        *,
        attributes: list[str] = [],  # noqa: B006 - read only; a list is what YAML shows
        images: int = 100,
        first_seed: int = 1000,
        level: float = 0.05,
        embeddings: Embeddings = [],  # noqa: B006 - read only
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        batch_size: int = 10,
    ) -> None:
        super().__init__()
        if not prompts:
            raise UserError(
                "model.prompts is empty; give a prompt for each class, such as {pirate: a <pirate> pirate}"
            )
        check_at_least("model", 1, images=images, batch_size=batch_size)
        if not 0 < level < 1:
            raise UserError(f"model.level must be above 0 and below 1, got {level}")
        self.of(Generate(backbone, embeddings=embeddings, sampling=sampling))
        self.classifier = (
            TimmClassifier(attribute_classifier) if isinstance(attribute_classifier, str) else attribute_classifier
        )
        names = attributes or list(self.classifier.label_names)
        self.attributes = resolve_attributes(dict.fromkeys(names), self.classifier)
        self.prompts, self.real, self.level = prompts, real, level
        self.class_names = list(prompts)
        self.images, self.first_seed, self.batch_size = images, first_seed, batch_size

    def on_test_start(self) -> None:
        """Look at the real images.

        Raises:
            UserError: if a token is not loaded, or a class has too few real images.
        """
        super().on_test_start()
        check_tokens(list(self.prompts.values()), self.task.learned_placeholders)
        if self.global_rank:  # records are collected from all processes
            return
        for name, pixels in self.real.of_classes(self.class_names, self.task.image_size).items():
            for first in range(0, len(pixels), self.batch_size):
                part = unit_range(list(pixels[first : first + self.batch_size]))
                self._record(REAL, [name] * len(part), range(first, first + len(part)), part.to(self.device))

    def test_dataloader(self) -> EvaluationBatches[tuple[str, int], list[tuple[str, int]]]:
        """This rank's part of all classes with all seeds."""
        number = len(self.class_names) * self.images

        def load(item: Item) -> tuple[str, int]:
            class_index, image = divmod(item.index, self.images)
            return self.class_names[class_index], self.first_seed + image

        return EvaluationBatches(
            partial(items_below, number),
            number,
            load,
            list,
            batch_size=self.batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    @torch.no_grad()
    def test_step(self, batch: list[tuple[str, int]]) -> None:
        """Generate the images of a batch, and look at their attributes."""
        classes, seeds = [name for name, _ in batch], [seed for _, seed in batch]
        images = self.task.pipeline.generate([self.prompts[name] for name in classes], seeds).clamp(0, 1)
        self._record(GENERATED, classes, seeds, images)

    @torch.no_grad()
    def _record(self, kind: str, classes: Sequence[str], seeds: Sequence[int], images: Tensor) -> None:
        """Record which attributes images (B, 3, H, W) show."""
        outputs = self.classifier(images)
        for attribute in self.attributes:
            self.records.update(
                "shown", attribute.class_index(outputs) == 1, seeds, method=kind, item=classes, label=attribute.name
            )
        for row, name in enumerate(classes):
            self.image_rows.add(f"{name}: {kind}", images[row, None])

    def make_table(self, records: list[Record]) -> Table:
        """See :class:`Evaluation`: a row per class and attribute, and a note for each bias."""
        keys = [(name, attribute.name) for name in self.class_names for attribute in self.attributes]
        generated, real = (
            _counts([record for record in records if record.method == kind], keys) for kind in (GENERATED, REAL)
        )
        lines = bias_report(generated, real, self.level)
        table = bias_table(lines, judge=self.classifier.pretrained, level=self.level)
        images = dict(self.image_rows.rows())
        captions = [f"{name}: {kind}" for name in self.class_names for kind in (REAL, GENERATED)]
        table.images = {"classes": [(caption, images[caption]) for caption in captions if caption in images]}
        return table


def bias_table(lines: Sequence[Bias], *, judge: str, level: float) -> Table:
    """The table of a report.

    Args:
        lines: the report.
        judge: name of the classifier that saw the attributes.
        level: error level of the report.
    """
    columns = [
        Column(name=kind, kind="share", measure="shown", method=kind, interval=True, bar=True)
        for kind in (GENERATED, REAL)
    ]
    columns.append(Column(name="difference", kind="difference", measure="shown", interval=True))
    columns.append(Column(name="biased", kind="count", measure="shown"))
    rows = [
        Row(
            f"{line.class_name}: {line.attribute}",
            {
                GENERATED: Cell(line.generated.share, *wilson_interval(*line.generated), line.generated.images),
                REAL: Cell(line.real.share, *wilson_interval(*line.real), line.real.images),
                "difference": Cell(line.difference, line.low, line.high, line.generated.images + line.real.images),
                "biased": Cell(float(line.is_biased), None, None, line.generated.images),
            },
        )
        for line in lines
    ]
    biased = [line for line in lines if line.is_biased]
    notes = [
        f"biased: {line.attribute} in {Figure(line.generated.share, 'share')} of the images of {line.class_name}, in "
        f"{Figure(line.real.share, 'share')} of real ones"
        for line in sorted(biased, key=lambda line: -abs(line.difference))
    ]
    notes.append(
        f"intervals of differences and biases after Holm's correction of {len(lines)} comparisons at {level:.0%}"
    )
    return Table(
        title=f"attributes seen by {judge}",
        heading="attribute",
        columns=columns,
        rows=rows,
        summary={
            "biased_attributes": Figure(len(biased), "count"),
            "compared_attributes": Figure(len(lines), "count"),
            "mean_absolute_difference": Figure(sum(abs(line.difference) for line in lines) / len(lines), "share"),
        },
        notes=notes,
    )


def _counts(records: Sequence[Record], keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Count]:
    """Counts of records of one kind of image."""
    shown, images = dict.fromkeys(keys, 0), dict.fromkeys(keys, 0)
    for record in records:
        shown[record.item, record.label] += round(record.value)
        images[record.item, record.label] += 1
    return {key: Count(shown[key], images[key]) for key in keys}
