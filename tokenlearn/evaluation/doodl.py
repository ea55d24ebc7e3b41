"""Evaluation of optimised latents: DOODL beside cheaper ways to meet an objective, judged by other models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from tokenlearn.data.sources import Item, Skipped, items_below
from tokenlearn.data.streams import EvaluationBatches
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.evaluation.base import Evaluation
from tokenlearn.evaluation.baselines import best_of, best_of_guided, local_search
from tokenlearn.evaluation.doodl_cases import CaseImage, DoodlCase, TargetedObjective
from tokenlearn.evaluation.doodl_table import doodl_table
from tokenlearn.evaluation.image_rows import ImageRows
from tokenlearn.evaluation.network_cost import NetworkCost
from tokenlearn.evaluation.realism import Realism
from tokenlearn.evaluation.records import Record
from tokenlearn.evaluation.table import Table
from tokenlearn.generation.generate import Generate
from tokenlearn.generation.results import file_stem
from tokenlearn.guidance import TFG, ClassifierGuidance, GuidanceRule
from tokenlearn.latent_optimiser import LatentOptimiser, Start, sampling_for
from tokenlearn.losses.objective import Objective, as_objective
from tokenlearn.metrics import KernelDistances, timed
from tokenlearn.models import DiffusionBackbone, TimmClassifier
from tokenlearn.objectives import require_judge_differs
from tokenlearn.pipeline import Pipeline
from tokenlearn.tokens import Embeddings

DoodlMethod = Literal["none", "text_as_prompt", "one_step", "tfg", "best_of", "search", "best_of_tfg", "doodl"]
"""Ways to make an image: no guidance; the text in the objective as the prompt; one-step classifier guidance;
training-free guidance; and at the cost of the last the best of several seeds, the best of several seeds and of noise
near the best, the best of several seeds under training-free guidance; and optimised latents."""

_AT_EQUAL_COST = ("best_of", "search", "best_of_tfg")
_RULES = ("one_step", "tfg", "best_of_tfg")


class DoodlEvaluation(Evaluation[Generate]):
    """Judged images of optimised latents, beside cheaper ways to meet the same objective.

    The images of every case are made by every method, and rated by the judge of the case. A config of this evaluation
    has no data section; run it by ``tokenlearn test``.

    Args:
        backbone: frozen diffusion model.
        cases: images, objectives and judges.
        methods: compared methods. ``text_as_prompt`` is left out of cases whose objective has no text, ``best_of`` and
            ``search`` where the first latents are not free, training-free guidance where a reversible solver samples.
        realism: distance to real images, or null.
        embeddings: embedding files of learned tokens for the prompts.
        batch_size: generated images of a case at once.

    Raises:
        UserError: if there are no cases or methods, a judge shares a model with its objective, the judges of a row
            give different scores, or a case cannot be optimised.
    """

    task_class = Generate

    def __init__(
        self,
        backbone: DiffusionBackbone,
        cases: list[DoodlCase],
        *,
        methods: list[DoodlMethod] = list(get_args(DoodlMethod)),  # noqa: B006, B008 - read only
        realism: Realism | None = None,
        embeddings: Embeddings = [],  # noqa: B006 - read only
        batch_size: int = 4,
    ) -> None:
        super().__init__()
        if not cases:
            raise UserError("model.cases is empty; give at least one, with a row, an objective, a judge and prompts")
        if not methods or len(set(methods)) < len(methods):
            raise UserError(f"model.methods must be different and at least one, got {methods}")
        check_at_least("model", 1, batch_size=batch_size)
        self.of(Generate(backbone, embeddings=embeddings))
        self.cases, self.methods, self.batch_size = cases, methods, batch_size
        self.objectives = nn.ModuleList(as_objective(case.objective) for case in cases)
        self.judges = nn.ModuleList(case.judge for case in cases)
        self.images = [case.case_images(backbone) for case in cases]
        self.row_judges = self._row_judges()
        self._pipelines: dict[int, Pipeline] = {}
        for case in range(len(cases)):
            self._check_case(case)
        self.realism = realism
        self.realism_judge = None if realism is None else TimmClassifier(realism.judge)
        self.realism_distances: KernelDistances | None = None
        self.rows_of_images = {row: ImageRows() for row in self.row_judges}
        self._cost = NetworkCost(backbone)

    def _row_judges(self) -> dict[str, Objective]:
        """Row to a judge of its cases, all of which give the same score."""
        judges: dict[str, Objective] = {}
        for case in self.cases:
            first = judges.setdefault(case.row, case.judge)
            if first.score_name != case.judge.score_name:
                raise UserError(
                    f"the judges of row '{case.row}' give {first.score_name} and {case.judge.score_name}; make it two "
                    "rows"
                )
        return judges

    def _check_case(self, number: int) -> None:
        """Refuse a case that would fail later."""
        case = self.cases[number]
        try:
            require_judge_differs(case.judge, self._objective(number))
            case.judge.check(case.targets)
            self._objective(number).check(case.targets)
            self._optimiser(number, case.targets)
        except UserError as error:
            raise UserError(f"in a case of row '{case.row}', {error}") from error
        rules = [method for method in self.methods if method in _RULES]
        if rules and not isinstance(case.sampling.guidance, int | float):
            raise UserError(
                f"method '{rules[0]}' is itself a guidance rule, but a case of row '{case.row}' has sampling.guidance "
                f"{type(case.sampling.guidance).__name__}; leave the method out, or set the guidance to a number"
            )

    def on_test_start(self) -> None:
        """Look at the real images, and count evaluations of the network.

        Raises:
            UserError: if there are fewer than two real images.
        """
        super().on_test_start()
        self.rows_of_images = {row: ImageRows() for row in self.row_judges}
        self._pipelines = {}  # the tokens may be those of a checkpoint
        if self.realism is not None and self.realism_judge is not None:
            reference = self.realism.features(self.realism_judge, self.task.image_size)
            groups = len(self.row_judges) * len(self.methods)
            self.realism_distances = KernelDistances(groups, reference).to(self.device)
        self._cost.start()

    def on_test_end(self) -> None:
        """Stop counting."""
        self._cost.stop()

    def test_dataloader(self) -> EvaluationBatches[CaseImage | None, list[CaseImage | None]]:
        """This rank's part of the images of all cases; None for a photo that cannot be read."""
        all_images = [(case, index) for case, images in enumerate(self.images) for index in range(len(images))]

        def load(item: Item) -> CaseImage | Skipped:
            case, index = all_images[item.index]
            try:
                return self.images[case].load(case, index)
            except UserError as error:
                return Skipped(self.images[case].images.names[index], str(error))

        return EvaluationBatches(
            partial(items_below, len(all_images)),
            len(all_images),
            load,
            list,
            batch_size=self.batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            in_place_of=lambda skipped: None,
        )

    def test_step(self, batch: list[CaseImage | None]) -> None:
        """Make the images of a batch by all methods, and judge them."""
        readable = [image for image in batch if image is not None]
        # By target too: an image then has the same neighbours, and numbers, as in a case of its target alone.
        for (case, _), of_case in groupby(readable, key=lambda part: (part.case, part.target)):
            images = list(of_case)
            # Photos differ in size.
            parts = [images] if images[0].image.image is None else [[image] for image in images]
            for part in parts:
                for method in self.methods:
                    if self._suits(case, method):
                        self._measure(case, method, part)

    def _suits(self, number: int, method: DoodlMethod) -> bool:
        """Whether a method can make the images of a case."""
        case = self.cases[number]
        if method == "text_as_prompt":
            return case.has_texts(self._objective(number))
        free = case.chooses_latents or method not in _AT_EQUAL_COST
        return free and (case.looks_ahead or method not in ("tfg", "best_of_tfg"))

    def _measure(self, number: int, method: DoodlMethod, batch: Sequence[CaseImage]) -> None:
        """Make images of a case by one method, and record their measures."""
        case, names = self.cases[number], [part.image.name for part in batch]
        targets = None if batch[0].target is None else [str(part.target) for part in batch]
        self._cost.reset()
        # The Trainer's inference mode makes tensors that can never have a gradient.
        with torch.inference_mode(False), torch.no_grad():
            images, seconds = timed(partial(self._make, number, method, batch, targets), self.device)
            images = images.to(self.device)
            scores = case.judge.score(images, targets)
            measures = {
                case.judge.score_name: scores,
                "loss": self._objective(number)(images, 0, targets),
                "seconds": torch.full_like(scores, seconds / len(batch)),
                "evaluations": torch.full_like(scores, self._cost.evaluations / len(batch)),
                "cost": torch.full_like(scores, self._cost.total / len(batch)),
                "sampling_steps": torch.full_like(scores, case.sampling.steps),
                "guidance_scale": torch.full_like(scores, case.guidance_scale),
            }
            features = None if self.realism_judge is None else self.realism_judge.features(images)
        for row, (name, target) in enumerate(zip(names, targets or [""] * len(batch), strict=True)):
            for measure, values in measures.items():
                self.records.update(measure, values[row, None], [name], method=method, item=case.row, label=target)
        if self.realism_distances is not None and features is not None:
            group = list(self.row_judges).index(case.row) * len(self.methods) + self.methods.index(method)
            self.realism_distances.update(features, torch.full((len(images),), group, device=images.device))
        self.rows_of_images[case.row].add(method.replace("_", " "), images)

    def _make(
        self, number: int, method: DoodlMethod, batch: Sequence[CaseImage], targets: Sequence[str] | None
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] by a method."""
        case, optimiser = self.cases[number], self._optimiser(number, targets)
        start = self._start(number, optimiser, batch)
        if method == "doodl":
            return optimiser.optimise(start, names=[part.image.name for part in batch]).after
        if method == "best_of":
            return best_of(optimiser, start, case.number_of_candidates)
        if method == "search":
            number_of_random = max(1, round(case.search.random_share * case.number_of_candidates))
            return local_search(
                optimiser, start, case.number_of_candidates, random=number_of_random, angle=case.search.angle
            )
        if method == "none":
            return optimiser.generate(start, start.latents).clamp(0, 1)
        if method == "text_as_prompt":
            texts = [", ".join(self._objective(number).texts(part.target)) for part in batch]
            described = optimiser.from_prompts(texts, [part.image.seed for part in batch])
            return optimiser.generate(described, described.latents).clamp(0, 1)
        prompts = [case.source_prompt] if case.images is not None else [part.image.prompt for part in batch]
        rule: GuidanceRule = (
            ClassifierGuidance(optimiser.objective, case.one_step_scale, case.guidance_scale)
            if method == "one_step"
            else TFG(optimiser.objective, case.tfg, case.guidance_scale)
        )
        candidates = max(1, case.number_of_candidates // case.tfg.cost) if method == "best_of_tfg" else 1
        return best_of_guided(optimiser, start, self._pipeline(number).encode(prompts), rule, candidates)

    def _start(self, number: int, optimiser: LatentOptimiser, batch: Sequence[CaseImage]) -> Start:
        """The first latents of images, all generated or all photos."""
        seeds = [part.image.seed for part in batch]
        photos = [part.image.image for part in batch if part.image.image is not None]
        if photos:
            return optimiser.from_images(torch.cat(photos), seeds, self.cases[number].source_prompt)
        return optimiser.from_prompts([part.image.prompt for part in batch], seeds)

    def _objective(self, number: int) -> Objective:
        return cast(Objective, self.objectives[number])

    def _pipeline(self, number: int) -> Pipeline:
        """The pipeline of a case, with the tokens of the evaluation."""
        if number not in self._pipelines:
            case = self.cases[number]
            sampling = sampling_for(case.sampling, inverts=case.images is not None)
            self._pipelines[number] = Pipeline(self.task.backbone, tokens=self.task.bank, sampling=sampling)
        return self._pipelines[number]

    def _optimiser(self, number: int, targets: Sequence[str] | None) -> LatentOptimiser:
        """The optimiser of a case, for a batch of images with these targets."""
        case = self.cases[number]
        objective = TargetedObjective(self._objective(number), targets)
        return LatentOptimiser(self._pipeline(number), objective, case.optimisation, gradient=case.gradient)

    def make_table(self, records: list[Record]) -> Table:
        """See :class:`Evaluation`: a row per objective, columns of each method."""
        distances: dict[tuple[str, str], float] = {}
        if self.realism_distances is not None:
            groups = [(row, method) for row in self.row_judges for method in self.methods]
            distances = dict(zip(groups, self.realism_distances.compute().reshape(-1).tolist(), strict=True))
        table = doodl_table(records, judges=self.row_judges, methods=self.methods, realism_distances=distances)
        for row in self.row_judges:
            sampled = dict.fromkeys(case.described_sampling() for case in self.cases if case.row == row)
            table.notes.append(f"{row}: {'; '.join(sampled)}")
        table.images = {file_stem(row): images.rows() for row, images in self.rows_of_images.items()}
        return table
