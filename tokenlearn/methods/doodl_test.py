"""The test of optimised latents: DOODL beside cheaper ways to guide, judged by models that guide nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from tokenlearn.data.image_source import open_images
from tokenlearn.data.images import read_image, square_pixels, unit_range
from tokenlearn.data.pictures import Picture
from tokenlearn.data.sharding import EvaluationBatches, Item, items_below
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.methods.doodl import Doodl, DoodlMethod
from tokenlearn.methods.generate import Generate
from tokenlearn.methods.image_guidance import ImageGuidance, is_guide
from tokenlearn.methods.image_judges import ClassJudge, ImageJudge
from tokenlearn.methods.picture_task import file_stem
from tokenlearn.metrics import (
    ClassAccuracy,
    GroupMeans,
    KernelDistances,
    PictureRows,
    Report,
    interval_cells,
    interval_columns,
    timed,
)
from tokenlearn.models import Conditioning, DiffusionBackbone, TimmClassifier

_FIGURES = ("loss", "seconds", "evaluations")
_PICTURES_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class DoodlCase:
    """Pictures that ask for one thing.

    Attributes:
        row: row of the table; what cases of the same row reach is counted together.
        judge: says how well pictures are what was asked for.
        task: the pictures and how they are optimised: a ``Doodl`` without its backbone. Its method does not matter.
    """

    row: str
    judge: ImageJudge
    task: Callable[[DiffusionBackbone], Doodl]


class AskedPicture(NamedTuple):
    """A picture of a case."""

    case: int
    picture: Picture


class DoodlTest(Generate):
    """Make the pictures of each case by each method, and have the case's judge say how well they are.

    A config of this task has no data section; run it by ``tokenlearn test``.

    Args:
        backbone: frozen diffusion model.
        cases: what is asked for.
        methods: columns, see :class:`Doodl`; ``best_of`` is left out of rows whose first latents are not free.
        realism_judge: timm name or folder of the classifier in whose features pictures are compared with real ones;
            null for no such figure.
        reference: real pictures, see :func:`tokenlearn.data.image_source.open_images`.
        reference_images: how many of them.
        embeddings: embedding files of learned tokens that prompts use.
        batch_size: generated pictures of a case at once.

    Raises:
        UserError: if there are no cases or methods, a judge guides, the judges of a row give different figures, or
            there is a realism judge without a reference.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        cases: list[DoodlCase],
        methods: list[DoodlMethod] = ["none", "one_step", "best_of", "doodl"],  # noqa: B006 - read only
        realism_judge: str | None = None,
        reference: str | None = None,
        reference_images: int = 200,
        embeddings: list[str] = [],  # noqa: B006 - as above
        batch_size: int = 4,
    ) -> None:
        super().__init__(backbone, embeddings)
        if not cases:
            raise UserError("model.cases is empty; give at least one, with a row, a judge and a task")
        if not methods or len(set(methods)) < len(methods):
            raise UserError(f"model.methods must be different and at least one, got {methods}")
        check_at_least("model", 1, batch_size=batch_size)
        check_at_least("model", 2, reference_images=reference_images)
        if realism_judge is not None and reference is None:
            raise UserError(
                f"the realism judge '{realism_judge}' has nothing to compare with; set model.reference, such as to "
                "a folder of pictures"
            )
        self.methods, self.batch_size = methods, batch_size
        self.tasks = nn.ModuleList(case.task(backbone) for case in cases)
        self.judges = nn.ModuleList(case.judge for case in cases)
        self.row_names = list(dict.fromkeys(case.row for case in cases))
        self._rows = [self.row_names.index(case.row) for case in cases]
        self._judge_figures = [self._judge_figure(row) for row in range(len(self.row_names))]
        for case in range(len(cases)):
            self._check_judge(case)

        cells = len(self.row_names) * len(methods)
        self.judged = ClassAccuracy(cells)
        self.figures = nn.ModuleDict({name: GroupMeans(cells) for name in ("judge", *_FIGURES)})
        self.realism_judge = None if realism_judge is None else TimmClassifier(realism_judge)
        self.reference, self.reference_images = reference, reference_images
        self.realism: KernelDistances | None = None
        self.shown = {row: PictureRows() for row in self.row_names}
        self.report: Report | None = None
        self._evaluations = 0
        # Before an evaluation, since recomputation for a gradient leaves the network before its end.
        backbone.register_forward_pre_hook(self._count_evaluations)

    def _judge_figure(self, row: int) -> str:
        figures = {self._judge(case).figure for case, own in enumerate(self._rows) if own == row}
        if len(figures) > 1:
            raise UserError(
                f"the judges of row '{self.row_names[row]}' give {' and '.join(sorted(figures))}; make it two rows"
            )
        return figures.pop()

    def _check_judge(self, case: int) -> None:
        judge = self._judge(case).pretrained
        if is_guide(judge, cast(Iterable[ImageGuidance], self._task(case).guidances)):
            raise UserError(
                f"the judge '{judge}' of row '{self.row_names[self._rows[case]]}' is one of its guidances; a judge "
                "must be another model"
            )

    def _task(self, case: int) -> Doodl:
        return cast(Doodl, self.tasks[case])

    def _judge(self, case: int) -> ImageJudge:
        return cast(ImageJudge, self.judges[case])

    def _count_evaluations(self, module: nn.Module, inputs: tuple[Tensor, Tensor, Conditioning]) -> None:
        self._evaluations += len(inputs[2])

    @torch.no_grad()
    def on_test_start(self) -> None:
        """Look at the real pictures.

        Raises:
            UserError: if there are fewer than two.
        """
        if self.realism_judge is None or self.reference is None:
            return
        size = self.backbone.latent_size * self.backbone.vae_scale_factor
        rows = islice(open_images(self.reference).open(), self.reference_images)
        pixels = [square_pixels(read_image(row["image"], 1), size) for row in rows]
        if len(pixels) < 2:
            raise UserError(f"model.reference '{self.reference}' has {len(pixels)} pictures, which cannot be compared")
        features = [
            self.realism_judge.features(unit_range(pixels[first : first + _PICTURES_AT_ONCE]).to(self.device))
            for first in range(0, len(pixels), _PICTURES_AT_ONCE)
        ]
        cells = len(self.row_names) * len(self.methods)
        self.realism = KernelDistances(cells, torch.cat(features)).to(self.device)

    def test_dataloader(self) -> EvaluationBatches[AskedPicture, list[AskedPicture]]:
        """This rank's part of all cases' pictures."""
        asked = [
            (case, index) for case in range(len(self.tasks)) for index in range(len(self._task(case).pictures.names))
        ]

        def load(item: Item) -> AskedPicture:
            case, index = asked[item.index]
            return AskedPicture(case, self._task(case).pictures[index])

        return EvaluationBatches(
            partial(items_below, len(asked)),
            len(asked),
            load,
            list,
            batch_size=self.batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    @torch.no_grad()
    def test_step(self, batch: list[AskedPicture]) -> None:
        """Make pictures by all methods, and have them judged."""
        for case, asked in groupby(batch, key=lambda asked: asked.case):
            pictures = [own.picture for own in asked]
            # Photographs have sizes of their own.
            together = [pictures] if pictures[0].image is None else [[picture] for picture in pictures]
            for some in together:
                for column, method in enumerate(self.methods):
                    if method != "best_of" or self._task(case).chooses_latents:
                        self._count(case, column, some)

    def _count(self, case: int, column: int, pictures: list[Picture]) -> None:
        """Make pictures of a case by one method, and count."""
        task, row, method = self._task(case), self._rows[case], self.methods[column]
        self._evaluations = 0
        edited, seconds = timed(partial(task.edited_by, method, pictures), self.device)
        images = torch.stack([picture.edits[0] for picture in edited]).to(self.device)
        judged = self._judge(case)(images)
        cells = torch.full((len(images),), row * len(self.methods) + column, device=images.device)
        if self._judge_figures[row] == ClassJudge.figure:
            self.judged.update(judged > 0, cells)
        found = {
            "judge": judged,
            "loss": task.loss(images, 0),
            "seconds": torch.full_like(judged, seconds / len(pictures)),
            "evaluations": torch.full_like(judged, self._evaluations / len(pictures)),
        }
        for name, values in found.items():
            cast(GroupMeans, self.figures[name]).update(values, cells)
        if self.realism is not None and self.realism_judge is not None:
            self.realism.update(self.realism_judge.features(images), cells)
        self.shown[self.row_names[row]].add(method.replace("_", " "), images)

    def on_test_epoch_end(self) -> None:
        """Make the report, and log its figures."""
        shape = (len(self.row_names), len(self.methods))
        counts = self.judged.compute().reshape(*shape, 2)
        figures = {name: cast(GroupMeans, metric).compute().reshape(shape) for name, metric in self.figures.items()}
        judged = figures.pop("judge")
        for figure in sorted(set(self._judge_figures) - {ClassJudge.figure}):
            own = torch.tensor([name == figure for name in self._judge_figures], device=judged.device)
            figures[figure] = judged.where(own[:, None], torch.nan)
        if self.realism is not None:
            figures["realism_distance"] = self.realism.compute().reshape(shape)

        columns = ["guidance"]
        rows: list[list[str | float | None]] = [[name] for name in self.row_names]
        plain: list[str] = []
        for column, method in enumerate(self.methods):
            own_columns = [f"{method}_{name}" for name in figures]
            columns += [*interval_columns(method), *own_columns]
            plain += own_columns
            for number, row in enumerate(rows):
                row += interval_cells(*counts[number, column].tolist())
                values = [float(figure[number, column]) for figure in figures.values()]
                row += [None if math.isnan(value) else value for value in values]
        keys = [[f"{name.replace(' ', '_')}_{method}" for method in self.methods] for name in self.row_names]
        summary = {
            key: float(value)
            for names, values in zip(keys, judged, strict=True)
            for key, value in zip(names, values, strict=True)
            if not value.isnan()
        }
        self.log_dict({f"test/{name}": value for name, value in summary.items()}, rank_zero_only=True)
        self.report = Report(
            title="optimised latents, each row by its judge",
            columns=columns,
            rows=rows,
            bars=list(self.methods),
            plain=plain,
            summary=summary,
            kinds={key: kind for names, kind in zip(keys, self._judge_figures, strict=True) for key in names},
            pictures={file_stem(name): shown.rows() for name, shown in self.shown.items()},
        )
