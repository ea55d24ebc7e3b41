"""Evaluation of class tokens: the judged score of prompts with the token, and of the cheap ways to the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_info

from tokenlearn.data.batches import PROMPT_KINDS, PromptBatch, PromptKind
from tokenlearn.data.interfaces import PromptTemplates, data_of
from tokenlearn.errors import UserError
from tokenlearn.evaluation.base import Evaluation
from tokenlearn.evaluation.records import Record
from tokenlearn.evaluation.table import Column, Figure, Kind, Pivot, Row, Table
from tokenlearn.losses.objective import Objective
from tokenlearn.training.class_tokens import ClassTokens

_CAPTIONS = {"name": "before", "token": "after"}
_FIT_SUMMARY: dict[PromptKind, str] = {"name": "name", "start": "step0", "token": "after"}


class ClassTokenEvaluation(Evaluation[ClassTokens]):
    """Judged score of class tokens, beside the cheap ways to the same images.

    Rivals are the bare name, the best single word of the vocabulary before it, the described class, and the words that
    the token started from. The prompts and seeds are those of ``PromptDataModule``, the same for every class and kind
    of prompt.

    Args:
        words: class to the word of the kind ``word``; null searches for it by the guiding objective, as for the start
            of a token.

    Attributes:
        words: as given, or as found.
    """

    task_class = ClassTokens

    def __init__(self, words: dict[str, str] | None = None) -> None:
        super().__init__()
        self.words = words

    @property
    def evaluate_after_fit(self) -> bool:
        """See :class:`Evaluation`: where the task has a judge."""
        return self.task.judge is not None

    def on_test_start(self) -> None:
        """Check that there is a judge.

        Raises:
            UserError: without a judge.
        """
        super().on_test_start()
        self._judge()

    @torch.no_grad()
    def test_step(self, batch: PromptBatch) -> None:
        """Generate the images of a batch and judge them."""
        judge, targets = self._judge(), self.task.targets(batch)
        images = self.task.pipeline.generate(self.prompts(batch), batch.seeds).clamp(0, 1)
        scores = judge.score(images, targets)
        for row, (name, kind, seed) in enumerate(zip(targets, batch.kinds, batch.seeds, strict=True)):
            self.records.update(judge.score_name, scores[row, None], [seed], method=kind, item=name)
            if kind in _CAPTIONS:
                self.image_rows.add(f"{name}: {_CAPTIONS[kind]}", images[row, None])

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

    def make_table(self, records: list[Record]) -> Table:
        """See :class:`Evaluation`: a row per class, a column per kind of prompt."""
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
            for name in PROMPT_KINDS
        ]
        rows = Pivot(records, self.task.class_names, columns).rows()
        means: dict[PromptKind, Figure] = {name: _mean(rows, name, kind) for name in PROMPT_KINDS if name in measured}
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
            summary={f"mean_{judge.score_name}_{name}": figure for name, figure in means.items()},
            fit_summary=_before_and_after(means, judge),
            images={"before_after": [(caption, images[caption]) for caption in captions if caption in images]},
        )

    def _judge(self) -> Objective:
        if self.task.judge is None:
            raise UserError("the evaluation needs an objective that did not train the tokens; set model.judge")
        return self.task.judge


def _mean(rows: Sequence[Row], column: str, kind: Kind) -> Figure:
    """Mean of a column over the classes that have images."""
    values = [value for row in rows if (value := row.cells[column].value) is not None]
    return Figure(sum(values) / len(values), kind)


def _before_and_after(means: dict[PromptKind, Figure], judge: Objective) -> dict[str, Figure]:
    return {f"judged_{judge.score_name}_{label}": means[kind] for kind, label in _FIT_SUMMARY.items() if kind in means}
