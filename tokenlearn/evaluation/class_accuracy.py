"""Evaluation of class tokens: the judged score of prompts with the token, and of the cheap ways to the same images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from tokenlearn.data.batches import PROMPT_KINDS, PromptBatch, PromptKind
from tokenlearn.data.interfaces import PromptTemplates, data_of
from tokenlearn.data.pixels import unit_range
from tokenlearn.errors import UserError
from tokenlearn.evaluation.base import Evaluation
from tokenlearn.evaluation.real_images import RealImages
from tokenlearn.evaluation.records import Record
from tokenlearn.evaluation.table import Column, Figure, Kind, Pivot, Row, Table
from tokenlearn.losses.objective import Objective
from tokenlearn.metrics import GroupFeatures, covered, expected_coverage, kernel_distance, relative_diversity
from tokenlearn.models import TimmClassifier
from tokenlearn.objectives import ClassifierLoss
from tokenlearn.pipeline import Pipeline
from tokenlearn.tokens import load_bank
from tokenlearn.training.class_tokens import ClassTokens

_CAPTIONS = {"name": "before", "token": "after"}
_FIT_SUMMARY: dict[PromptKind, str] = {"name": "name", "start": "step0", "token": "after"}


DIVERSITY, COVERAGE, REALISM = "diversity", "coverage", "realism_distance"
_VARIETY: dict[str, Kind] = {DIVERSITY: "score", COVERAGE: "share", REALISM: "distance"}
_ALL_CLASSES = "all classes"  # an item of records
_NEIGHBOURS = 5
"""Real images in the ball of a real image, by which coverage is measured."""

_REAL_BATCH = 64


class OtherTokens(NamedTuple):
    """Tokens of other embedding files for the same classes.

    Attributes:
        pipeline: the task's, with these tokens.
        subjects: class name to the phrase with its token.
    """

    pipeline: Pipeline
    subjects: Mapping[str, str]


class ClassTokenEvaluation(Evaluation[ClassTokens]):
    """Judged score of class tokens, beside the cheap ways to the same images.

    Rivals are the bare name, the best single word of the vocabulary before it, the described class, the words that
    the token started from, and tokens of other trainings. The prompts and seeds are those of ``PromptDataModule``, the
    same for every class and kind of prompt.

    With real images, three measures stand beside the score, all in the features of the judge: diversity, the mean
    distance of two images over that of two real ones; coverage, the share of real images near which there is a
    generated one; and the kernel distance to the real images, of each class and of all classes together, each of which
    then has as many images as the others.

    Args:
        words: class to the word of the kind ``word``; null searches for it by the guiding objective, as for the start
            of a token.
        embeddings: name of a further kind of prompt to embedding files of other tokens of the classes, such as those
            of a training from another start, or of textual inversion. They are tested with the kind ``token``.
        real: real images, labelled with the classes; null leaves these measures out.

    Attributes:
        words: as given, or as found.

    Raises:
        UserError: if other tokens are named as a kind of prompt, or there are too few real images for coverage.
    """

    task_class = ClassTokens

    def __init__(
        self,
        words: dict[str, str] | None = None,
        *,
        embeddings: dict[str, str | list[str]] = {},  # noqa: B006 - read only
        real: RealImages | None = None,
    ) -> None:
        super().__init__()
        if taken := sorted(set(PROMPT_KINDS) & embeddings.keys()):
            raise UserError(
                f"evaluation.embeddings has '{taken[0]}', which is a kind of prompt already; give it another name"
            )
        if real is not None and real.images <= _NEIGHBOURS:
            raise UserError(
                f"real.images is {real.images}, and coverage needs {_NEIGHBOURS + 1} images of a class; set it to "
                f"{_NEIGHBOURS + 1} or more"
            )
        self.words, self.embeddings = words, embeddings
        self.real = None if real is None else dataclasses.replace(real, fewest=max(real.fewest, _NEIGHBOURS + 1))
        self.others: dict[str, OtherTokens] = {}
        self.real_features: dict[str, Tensor] = {}
        self.features: GroupFeatures | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """Kinds of prompt that the table may have, other tokens last."""
        return (*PROMPT_KINDS, *self.embeddings)

    @property
    def evaluate_after_fit(self) -> bool:
        """See :class:`Evaluation`: where the task has a judge."""
        return self.task.judge is not None

    def on_test_start(self) -> None:
        """Check that there is a judge, read other tokens, and look at the real images.

        Raises:
            UserError: without a judge, or one without features beside real images; if other tokens cannot be read or
                lack a class, or there are too few real images.
        """
        super().on_test_start()
        self._judge()
        self.others = {name: self._other_tokens(name, files) for name, files in self.embeddings.items()}
        self.real_features, self.features = {}, None
        if self.real is not None:
            classifier = self._classifier()
            for name, pixels in self.real.of_classes(self.task.class_names, self.task.image_size).items():
                parts = [unit_range(list(part)).to(self.device) for part in torch.split(pixels, _REAL_BATCH)]
                self.real_features[name] = torch.cat([classifier.features(part) for part in parts])
            self.features = GroupFeatures(len(self.methods) * len(self.task.class_names)).to(self.device)

    @torch.no_grad()
    def test_step(self, batch: PromptBatch) -> None:
        """Generate the images of a batch, with other tokens too where it has tokens, and judge them."""
        targets = self.task.targets(batch)
        images = self.task.pipeline.generate(self.prompts(batch), batch.seeds).clamp(0, 1)
        self._record(images, batch.kinds, targets, batch.seeds)
        for row, (name, kind) in enumerate(zip(targets, batch.kinds, strict=True)):
            if kind in _CAPTIONS:
                self.image_rows.add(f"{name}: {_CAPTIONS[kind]}", images[row, None])
        rows = [row for row, kind in enumerate(batch.kinds) if kind == "token"]
        if not rows:
            return
        names, seeds = [targets[row] for row in rows], [batch.seeds[row] for row in rows]
        for method, (pipeline, subjects) in self.others.items():
            prompts = [batch.templates[row].format(subjects[targets[row]]) for row in rows]
            self._record(pipeline.generate(prompts, seeds).clamp(0, 1), [method] * len(rows), names, seeds)

    def _record(self, images: Tensor, methods: Sequence[str], names: Sequence[str], seeds: Sequence[int]) -> None:
        """Judge images (B, 3, H, W) of B kinds of prompt, classes and seeds."""
        judge = self._judge()
        scores = judge.score(images, names)
        for row, (method, name, seed) in enumerate(zip(methods, names, seeds, strict=True)):
            self.records.update(judge.score_name, scores[row, None], [seed], method=method, item=name)
        if self.features is not None:
            groups = [self._group(method, name) for method, name in zip(methods, names, strict=True)]
            self.features.update(self._classifier().features(images), torch.tensor(groups, device=images.device))

    def _group(self, method: str, name: str) -> int:
        """Index of the features of a class's images by a kind of prompt."""
        return self.methods.index(method) * len(self.task.class_names) + self.task.class_names.index(name)

    def on_test_epoch_end(self) -> None:
        """Measure the variety of the images of all processes, and make the table."""
        if self.features is not None:
            groups = self.features.compute()
            if groups and self.trainer.is_global_zero:  # records are collected from all processes
                self._record_variety(groups)
        super().on_test_epoch_end()

    def _record_variety(self, groups: Sequence[Tensor]) -> None:
        """Record diversity, coverage and distance of the features of each group."""
        for method in self.methods:
            self._record_realism(method, groups)
            for name, real in self.real_features.items():
                found = groups[self._group(method, name)]
                if not len(found):
                    continue
                diversity = relative_diversity(found, real)
                self.records.update(DIVERSITY, diversity[None], ["all images"], method=method, item=name)
                names = [f"real image {place}" for place in range(len(real))]
                self.records.update(COVERAGE, covered(found, real, _NEIGHBOURS), names, method=method, item=name)

    def _record_realism(self, method: str, groups: Sequence[Tensor]) -> None:
        """Record the distance of a method's images to real ones, of each class and of all together."""
        found = {name: groups[self._group(method, name)] for name in self.real_features}
        pairs = {name: (of, self.real_features[name]) for name, of in found.items() if len(of) > 1}
        if not pairs:
            return
        distances = {name: kernel_distance(*pair) for name, pair in pairs.items()}
        generated, real = (_equal_parts(parts) for parts in zip(*pairs.values(), strict=True))
        distances[_ALL_CLASSES] = kernel_distance(generated, real)
        for item, distance in distances.items():
            self.records.update(REALISM, distance[None], ["all images"], method=method, item=item)

    def prompts(self, batch: PromptBatch) -> list[str]:
        """Prompts (B) of a batch.

        Raises:
            UserError: if the words of the settings lack a class.
        """
        words = self._words(set(self.task.targets(batch))) if "word" in batch.kinds else {}
        return self.task.prompts(batch, words)

    def _words(self, names: set[str]) -> Mapping[str, str]:
        """The words of the settings, or found ones; refused if they lack a class."""
        if self.words is None:
            template = data_of(self.trainer, PromptTemplates).templates[0]
            self.words = self.task.best_words(template, progress=self.global_rank == 0)
            listed = ", ".join(f"{name}: {word}" for name, word in self.words.items())
            rank_zero_info(f"best words by the guiding objective: {listed}")
        if missing := sorted(names - self.words.keys()):
            raise UserError(f"evaluation.words has no class '{missing[0]}'; it has {', '.join(self.words)}")
        return self.words

    def _other_tokens(self, name: str, files: str | list[str]) -> OtherTokens:
        """Other tokens, refused if they lack a class."""
        task = self.task
        bank, contents = load_bank(files, task.backbone.embedding_widths, task.backbone.word_tables)
        subjects = {
            file.metadata.get("class", file.token): file.metadata.get("prompt", file.token) for file in contents
        }
        if missing := [of_class for of_class in task.class_names if of_class not in subjects]:
            raise UserError(
                f"evaluation.embeddings.{name} has no token of class '{missing[0]}', only of {', '.join(subjects)}; "
                "give its file too"
            )
        return OtherTokens(task.pipeline.with_tokens(bank), subjects)

    def make_table(self, records: list[Record]) -> Table:
        """See :class:`Evaluation`: a row per class, a column per kind of prompt, and two more beside real images."""
        judge = self._judge()
        measured = {record.method for record in records}
        kind: Kind = judge.score_kind
        is_share = kind == "share"
        columns = [
            Column(
                name=name,
                kind=kind,
                measure=judge.score_name,
                method=name,
                interval=is_share,
                bar=is_share and name in measured,
                printed=name in measured,
            )
            for name in self.methods
        ]
        if self.real is not None:
            columns += [
                Column(name=f"{name}_{measure}", kind=of_measure, measure=measure, method=name, printed=False)
                for measure, of_measure in _VARIETY.items()
                for name in self.methods
            ]
        rows = Pivot(records, self.task.class_names, columns).rows()
        means = {column.name: mean for column in columns if (mean := _mean(rows, column)) is not None}
        self.task.judged_accuracies = {
            self.task.placeholders[row.name]: value for row in rows if (value := row.cells["token"].value) is not None
        }
        images = dict(self.image_rows.rows())
        captions = [f"{name}: {caption}" for name in self.task.class_names for caption in _CAPTIONS.values()]
        return Table(
            title=f"judged by {', '.join(judge.models())}",
            heading="class",
            columns=columns,
            rows=rows,
            summary={
                f"mean_{column.measure}_{column.method}": means[column.name]
                for column in columns
                if column.name in means
            }
            | {
                f"{REALISM}_{record.method}": Figure(record.value, "distance")
                for record in records
                if record.measure == REALISM and record.item == _ALL_CLASSES
            },
            fit_summary=_before_and_after(means, judge),
            notes=_coverage_notes(rows, [name for name in self.methods if name in measured]),
            images={"before_after": [(caption, images[caption]) for caption in captions if caption in images]},
        )

    def _classifier(self) -> TimmClassifier:
        """The judge's classifier, in whose features images are compared."""
        judge = self._judge()
        if not isinstance(judge, ClassifierLoss):
            raise UserError(
                f"evaluation.real compares images in the features of a classifier, and model.judge is a "
                f"{type(judge).__name__}; judge by a ClassifierLoss, or leave evaluation.real out"
            )
        return judge.classifier

    def _judge(self) -> Objective:
        if self.task.judge is None:
            raise UserError("the evaluation needs an objective that did not train the tokens; set model.judge")
        return self.task.judge


def _equal_parts(parts: Sequence[Tensor]) -> Tensor:
    """The same number of the first rows of each part, together."""
    number = min(map(len, parts))
    return torch.cat([part[:number] for part in parts])


def _mean(rows: Sequence[Row], column: Column) -> Figure | None:
    """Mean of a column over the classes that have images; None without any."""
    values = [value for row in rows if (value := row.cells[column.name].value) is not None]
    return Figure(sum(values) / len(values), column.kind) if values else None


def _before_and_after(means: Mapping[str, Figure], judge: Objective) -> dict[str, Figure]:
    return {f"judged_{judge.score_name}_{label}": means[kind] for kind, label in _FIT_SUMMARY.items() if kind in means}


def _coverage_notes(rows: Sequence[Row], methods: Sequence[str]) -> list[str]:
    """What coverage would be if the images were real ones, which depends on the numbers of images."""
    expected = [
        expected_coverage(cells[method].images, cells[column].images, _NEIGHBOURS)
        for _, cells in rows
        for method in methods
        if (column := f"{method}_{COVERAGE}") in cells and cells[column].images
    ]
    if not expected:
        return []
    share = Figure(sum(expected) / len(expected), "share")
    return [f"as many images of the distribution of the real ones would cover {share}, and have diversity 1"]
