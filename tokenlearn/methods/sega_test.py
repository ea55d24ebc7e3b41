"""The test of semantic guidance: the tables of SEGA's paper (https://arxiv.org/abs/2301.12247) in small."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenlearn.data.sharding import EvaluationBatches, items_below
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.guidance import (
    SAFETY_PRESETS,
    ConceptSettings,
    SafeGuidance,
    SafetySettings,
    SummedGuidance,
)
from tokenlearn.methods.attributes import resolve_attributes
from tokenlearn.methods.concepts import SemanticEdit, check_steps, check_tokens, encode_terms, semantic_guidance
from tokenlearn.methods.generate import Generate
from tokenlearn.metrics import (
    ClassAccuracy,
    GroupMeans,
    PictureRows,
    Report,
    ScaleRanks,
    interval_cells,
    interval_columns,
    mean_share,
    timed,
)
from tokenlearn.models import DiffusionBackbone, TimmClassifier

_OWN, _TOKENS, _PROMPTS, _COMPOSABLE, _SAFE = (
    "semantic guidance",
    "learned tokens",
    "prompt editing",
    "composable",
    "safe",
)
_METHODS = (_OWN, _TOKENS, _PROMPTS, _COMPOSABLE, _SAFE)
_SIDES = ("add", "remove")


@dataclass(frozen=True, kw_only=True)
class AttributeWords:
    """How each of the compared methods asks for an attribute.

    A concept may be words, a learned token, or a signed sum of these. Null leaves the attribute out of a method's
    column; without an opposite, a concept is removed at the negative of its scale.

    Attributes:
        label: the judge's label.
        concept: for semantic guidance, composable and safe diffusion.
        opposite: concept of its absence.
        token: concept of learned tokens.
        opposite_token: the same of its absence.
        prompt: whole prompt that asks for it.
        opposite_prompt: whole prompt that asks for its absence.
        scale: of the concept in semantic guidance, in place of that of ``edit``.
        removal_scale: the same in place of that of ``removal``.
        removable: whether it is also removed; not for what is itself a lack, such as baldness.
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
class Arithmetic:
    """A sum of concepts that should turn one thing into another.

    Attributes:
        prompt: what is drawn.
        concept: the signed sum.
        judge: timm name or folder of the classifier that counts.
        label: its label of what should come out.
    """

    prompt: str
    concept: str
    judge: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Suppression:
    """Something unwanted that a prompt brings along.

    Attributes:
        prompt: what is drawn.
        concept: what is unwanted.
        label: the judge's label for it.
    """

    prompt: str
    concept: str
    label: str


class _Part(NamedTuple):
    """One wanted part of a combination: an attribute, whether it should be there, and an edit of its own."""

    attribute: int
    wanted: bool
    edit: SemanticEdit | None


class SegaTest(Generate):
    """Count what semantic guidance changes, and what it leaves alone, beside other ways to ask for the same.

    Pictures of a neutral prompt are drawn plain from fixed seeds. Each attribute is then added to those that lack it
    and, if removable, removed from those that have it, by the word of the judge, who counts successes and untouched
    attributes. A config of this task has no data section; run it by ``tokenlearn test``.

    Args:
        backbone: frozen diffusion model.
        judge: timm name or folder of the classifier that counts.
        attributes: attributes of the judge and how each method asks for them.
        prompt: neutral prompt.
        edit: how concepts are added.
        removal: how they are removed, at the negative of its scale; null for as they are added.
        token_edit: how learned tokens are added, and removed unless they have opposites; null for no such column.
        composable_scale: guidance scale of concepts in composable diffusion.
        safety: settings of safe latent diffusion, which removes only; its presets are for 50 steps.
        embeddings: embedding files of learned tokens.
        combinations: attributes to change together, of pictures that lack all of it, each with the edit that changes
            it, or null for the one that changes it alone; ``no smile`` asks for absence.
        styles: further prompts, to whose pictures attributes are added too.
        arithmetic: a sum of concepts, or null.
        suppression: something that a prompt brings along unwanted, or null.
        monotonicity_scales: scales among which the judge's logit should rise; the rank correlation is of those from 0
            on, in the direction that a picture needs, and ``both_sides_rank_correlation`` of all.
        monotonicity_edit: how concepts are added at these scales; its own scale does not matter. Null for ``edit``,
            which may complete a concept at a low scale already, so that higher ones have nothing to rank.
        first_seed: first of the seeds; the paper chose its settings on seeds below 100.
        num_seeds: pictures of the neutral prompt.
        compared_seeds: how many of them the other methods are counted on.
        style_seeds: pictures of each style.
        monotonicity_seeds: pictures that are edited at all scales.
        num_inference_steps: sampling steps.
        guidance_scale: classifier-free guidance scale of prompts.
        scheduler: diffusers scheduler by class name; null for the pipeline's own.
        negative_prompt: prompt of the unconditional branch.
        batch_size: seeds at once.

    Raises:
        UserError: if the judge lacks a label, a combination has an unknown attribute, or a number is out of range.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        judge: str,
        attributes: list[AttributeWords],
        prompt: str,
        edit: ConceptSettings = ConceptSettings(),  # noqa: B008 - frozen
        removal: ConceptSettings | None = None,
        token_edit: ConceptSettings | None = None,
        composable_scale: float = 5.0,
        safety: SafetySettings = SAFETY_PRESETS["strong"],
        embeddings: list[str] = [],  # noqa: B006 - read only; a list is what YAML shows
        combinations: list[dict[str, SemanticEdit | None]] = [],  # noqa: B006 - as above
        styles: list[str] = [],  # noqa: B006 - as above
        arithmetic: Arithmetic | None = None,
        suppression: Suppression | None = None,
        monotonicity_scales: list[float] = [-8, -6, -4, -2, 0, 2, 4, 6, 8],  # noqa: B006 - as above
        monotonicity_edit: ConceptSettings | None = None,
        first_seed: int = 100,
        num_seeds: int = 250,
        compared_seeds: int = 50,
        style_seeds: int = 10,
        monotonicity_seeds: int = 10,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        scheduler: str | None = None,
        negative_prompt: str = "",
        batch_size: int = 10,
    ) -> None:
        super().__init__(backbone, embeddings, num_inference_steps, guidance_scale, scheduler, negative_prompt)
        if not attributes:
            raise UserError("model.attributes is empty; give at least one, such as {label: smile, concept: smile}")
        check_at_least("model", 1, num_seeds=num_seeds, batch_size=batch_size)
        check_at_least(
            "model",
            0,
            first_seed=first_seed,
            compared_seeds=compared_seeds,
            style_seeds=style_seeds,
            monotonicity_seeds=monotonicity_seeds,
        )
        if monotonicity_seeds and len(set(monotonicity_scales)) < 2:
            raise UserError(f"model.monotonicity_scales must be two or more numbers, got {monotonicity_scales}")
        self.judge = TimmClassifier(judge)
        self.words = attributes
        self.attributes = resolve_attributes({words.label: None for words in attributes}, self.judge)
        self.combinations = [self._parts(combination) for combination in combinations]
        self.combination_names = [" + ".join(combination) for combination in combinations]
        self.prompt, self.edit, self.removal, self.token_edit = prompt, edit, removal or edit, token_edit
        self.composable_scale, self.safety = composable_scale, safety
        self.styles, self.arithmetic, self.suppression = styles, arithmetic, suppression
        self.scales, self.monotonicity_edit = monotonicity_scales, monotonicity_edit or edit
        self.first_seed, self.num_seeds, self.compared_seeds = first_seed, num_seeds, compared_seeds
        self.style_seeds, self.monotonicity_seeds, self.batch_size = style_seeds, monotonicity_seeds, batch_size
        edits = [
            self._edit(words.concept, settings)
            for words in attributes
            for settings in (edit, self.removal, token_edit or edit, self.monotonicity_edit)
        ]
        edits += [part.edit for parts in self.combinations for part in parts if part.edit is not None]
        check_steps(edits, num_inference_steps)

        self.arithmetic_judge = None if arithmetic is None else TimmClassifier(arithmetic.judge)
        if arithmetic is not None and self.arithmetic_judge is not None:
            self._wanted = resolve_attributes({arithmetic.label: None}, self.arithmetic_judge)[0]
            check_steps([self._edit(arithmetic.concept, edit)], num_inference_steps)
        if suppression is not None:
            self._unwanted = resolve_attributes({suppression.label: None}, self.judge)[0]
        self._cells = (len(_METHODS), len(attributes), len(_SIDES))
        cells = len(_METHODS) * len(attributes) * len(_SIDES)
        self.success, self.kept = ClassAccuracy(cells), ClassAccuracy(cells)
        self.seconds = GroupMeans(1 + len(_METHODS))
        self.ranks = ScaleRanks(len(attributes))
        self.in_styles, self.kept_in_styles = (ClassAccuracy(max(1, len(styles))) for _ in range(2))
        self._most = max([1, *map(len, self.combinations)])
        self.at_least, self.each = (ClassAccuracy(max(1, len(combinations)) * self._most) for _ in range(2))
        self.turned, self.suppressed = ClassAccuracy(2), ClassAccuracy(3)
        self.shown = PictureRows()
        self.report: Report | None = None

    def _parts(self, combination: Mapping[str, SemanticEdit | None]) -> list[_Part]:
        known = {
            name: (index, bool(wanted))
            for index, attribute in enumerate(self.attributes)
            for wanted, name in enumerate(attribute.class_names)
        }
        for name in combination:
            if name not in known:
                raise UserError(f"model.combinations has '{name}', which is none of {', '.join(known)}")
        return [_Part(*known[name], edit) for name, edit in combination.items()]

    def on_test_start(self) -> None:
        """Check that every learned token is loaded.

        Raises:
            UserError: if one is not.
        """
        concepts = [words.concept for words in self.words] + [words.opposite for words in self.words]
        concepts += [part.edit.concept for parts in self.combinations for part in parts if part.edit is not None]
        concepts += [asked.concept for asked in (self.arithmetic, self.suppression) if asked is not None]
        if self.token_edit is not None:
            concepts += [concept for words in self.words for concept in (words.token, words.opposite_token)]
        check_tokens(
            [concept for concept in concepts if concept is not None],
            () if self.bank is None else self.bank.placeholders,
        )

    def test_dataloader(self) -> EvaluationBatches[int, list[int]]:
        """This rank's part of the seeds, numbered from 0."""
        return EvaluationBatches(
            partial(items_below, self.num_seeds),
            self.num_seeds,
            lambda item: item.index,
            list,
            batch_size=self.batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    @torch.no_grad()
    def test_step(self, batch: list[int]) -> None:
        """Draw pictures of the batch's seeds plain and edited in all ways, and count."""
        seeds = [self.first_seed + index for index in batch]
        plain = self._timed(0, seeds, lambda: self._plain(self.prompt, seeds))
        self.shown.add("plain", plain)
        before = self.classes(plain)
        self._count_edits(batch, seeds, before)
        for number, parts in enumerate(self.combinations):
            self._count_combination(number, parts, seeds, before)
        if len(rows := [index for index in batch if index < self.monotonicity_seeds]):
            chosen = torch.tensor([index < self.monotonicity_seeds for index in batch], device=before.device)
            self._rank([self.first_seed + index for index in rows], before[chosen])
        if len(rows := [index for index in batch if index < self.style_seeds]):
            for style, prompt in enumerate(self.styles):
                self._count_style(style, prompt, [self.first_seed + index for index in rows])
        if len(rows := [index for index in batch if index < self.compared_seeds]):
            self._count_others([self.first_seed + index for index in rows])

    def classes(self, images: Tensor) -> Tensor:
        """Whether (B, attributes) the judge sees each attribute in images (B, 3, H, W)."""
        outputs = self.judge(images)
        return torch.stack([attribute.class_index(outputs) for attribute in self.attributes], dim=1).bool()

    def _count_edits(self, batch: Sequence[int], seeds: Sequence[int], before: Tensor) -> None:
        """Add each attribute where it lacks and remove it where it shows, by every method."""
        for method in range(len(_METHODS)):
            compared = torch.tensor([method == 0 or index < self.compared_seeds for index in batch]).to(before.device)
            for number, words in enumerate(self.words):
                for side in range(1 + words.removable):
                    chosen = (compared & (before[:, number] == bool(side))).nonzero()[:, 0]
                    draw = self._drawing(_METHODS[method], words, adding=side == 0)
                    if draw is None or not len(chosen):
                        continue
                    own = [seeds[row] for row in chosen.tolist()]
                    edited = self._timed(1 + method, own, partial(draw, own))
                    cell = (method * len(self.words) + number) * len(_SIDES) + side
                    self._count(self.success, self.kept, cell, number, edited, before[chosen])
                    if method == 0:
                        self.shown.add(self.attributes[number].class_names[1 - side], edited)

    def _count(
        self, success: ClassAccuracy, kept: ClassAccuracy, cell: int, attribute: int, edited: Tensor, before: Tensor
    ) -> None:
        """Count changes of an attribute, and other attributes that did not change, of edits of one kind."""
        same = self.classes(edited) == before
        others = same[:, [index for index in range(len(self.attributes)) if index != attribute]].flatten()
        success.update(~same[:, attribute], torch.full_like(before[:, 0], cell, dtype=torch.long))
        kept.update(others, torch.full_like(others, cell, dtype=torch.long))

    def _drawing(self, method: str, words: AttributeWords, adding: bool) -> Callable[[Sequence[int]], Tensor] | None:
        """How a method adds or removes an attribute in pictures of seeds; None where it cannot."""
        if method == _PROMPTS:
            prompt = words.prompt if adding else words.opposite_prompt
            return None if prompt is None else lambda seeds: self._plain(prompt, seeds)
        if method == _SAFE:
            return None if adding else lambda seeds: self._safe(self.prompt, words.concept, seeds)
        if method == _COMPOSABLE:
            sign = 1 if adding else -1
            return lambda seeds: self._composed(words.concept, sign * self.composable_scale, seeds)
        settings = self.token_edit if method == _TOKENS else self.edit if adding else self.removal
        if settings is None or (method == _TOKENS and words.token is None):
            return None
        edit = self._direction(words, adding, settings, tokens=method == _TOKENS)
        return lambda seeds: self._guided(self.prompt, [edit], seeds)

    def _direction(
        self, words: AttributeWords, adding: bool, settings: ConceptSettings, tokens: bool = False
    ) -> SemanticEdit:
        """The edit that adds or removes an attribute."""
        concept, opposite = (words.token, words.opposite_token) if tokens else (words.concept, words.opposite)
        assert concept is not None
        own_scale = words.scale if adding else words.removal_scale
        if own_scale is not None and not tokens:
            settings = dataclasses.replace(settings, scale=own_scale)
        if not adding and opposite is not None:
            return self._edit(opposite, settings)
        return self._edit(concept, settings, 1 if adding else -1)

    @staticmethod
    def _edit(concept: str, settings: ConceptSettings, sign: int = 1) -> SemanticEdit:
        own: dict[str, Any] = dataclasses.asdict(settings)
        return SemanticEdit(concept=concept, **(own | {"scale": sign * settings.scale}))

    def _count_combination(self, number: int, parts: Sequence[_Part], seeds: Sequence[int], before: Tensor) -> None:
        """Change several attributes in one edit, of the pictures that need all of them."""
        wanted = torch.tensor([part.wanted for part in parts], device=before.device)
        own = [part.attribute for part in parts]
        chosen = (before[:, own] != wanted).all(dim=1).nonzero()[:, 0]
        if not len(chosen):
            return
        edits = [
            part.edit
            or self._direction(self.words[part.attribute], part.wanted, self.edit if part.wanted else self.removal)
            for part in parts
        ]
        edited = self._guided(self.prompt, edits, [seeds[row] for row in chosen.tolist()])
        reached = self.classes(edited)[:, own] == wanted
        self.shown.add(self.combination_names[number], edited)
        first = number * self._most
        for index in range(len(parts)):
            cells = torch.full((len(reached),), first + index, device=before.device)
            self.at_least.update(reached.sum(dim=1) > index, cells)
            self.each.update(reached[:, index], cells)

    def _rank(self, seeds: Sequence[int], before: Tensor) -> None:
        """Rank the judge's logit of each picture against the scale that it was drawn with."""
        scales = torch.tensor(self.scales, dtype=torch.float32, device=self.device)
        repeated = [seed for seed in seeds for _ in self.scales]
        for number, (words, attribute) in enumerate(zip(self.words, self.attributes, strict=True)):
            edits = [self._edit(words.concept, self.monotonicity_edit)]
            images = self._guided(self.prompt, edits, repeated, [scales.repeat(len(seeds))])
            logits = attribute.logits(self.judge(images))
            scores = (logits[:, 1] - logits[:, 0]).reshape(len(seeds), len(scales))
            self.ranks.update(scores, scales.expand_as(scores), before[:, number], number)

    def _count_style(self, style: int, prompt: str, seeds: Sequence[int]) -> None:
        """Add each attribute to pictures of another prompt that lack it."""
        before = self.classes(self._plain(prompt, seeds))
        for number, words in enumerate(self.words):
            chosen = (~before[:, number]).nonzero()[:, 0]
            if len(chosen):
                edit = self._direction(words, adding=True, settings=self.edit)
                edited = self._guided(prompt, [edit], [seeds[row] for row in chosen.tolist()])
                self._count(self.in_styles, self.kept_in_styles, style, number, edited, before[chosen])

    def _count_others(self, seeds: Sequence[int]) -> None:
        """Arithmetic of concepts, and suppression of what is unwanted."""
        if self.arithmetic is not None and self.arithmetic_judge is not None:
            prompt, edit = self.arithmetic.prompt, self._edit(self.arithmetic.concept, self.edit)
            for cell, images in enumerate((self._plain(prompt, seeds), self._guided(prompt, [edit], seeds))):
                found = self._wanted.class_index(self.arithmetic_judge(images)).bool()
                self.turned.update(found, torch.full_like(found, cell, dtype=torch.long))
                self.shown.add(self.arithmetic.concept if cell else prompt, images)
        if self.suppression is not None:
            prompt, concept = self.suppression.prompt, self.suppression.concept
            edit = self._edit(concept, self.removal, -1)
            drawn = (
                self._plain(prompt, seeds),
                self._guided(prompt, [edit], seeds),
                self._safe(prompt, concept, seeds),
            )
            for cell, images in enumerate(drawn):
                found = self._unwanted.class_index(self.judge(images)).bool()
                self.suppressed.update(found, torch.full_like(found, cell, dtype=torch.long))
                self.shown.add((prompt, f"no {concept}", f"no {concept}, safe")[cell], images)

    def _plain(self, prompt: str, seeds: Sequence[int]) -> Tensor:
        conditionings = self.guidance.conditionings(self.unconditional(), self.backbone.encode_prompts([prompt]))
        return self.draw(seeds, conditionings, self.guidance)

    def _guided(
        self,
        prompt: str,
        edits: Sequence[SemanticEdit],
        seeds: Sequence[int],
        sample_scales: Sequence[Tensor] | None = None,
    ) -> Tensor:
        rule = semantic_guidance(self.guidance.guidance_scale, edits, sample_scales=sample_scales)
        conditions = [self.backbone.encode_prompts([prompt]), *encode_terms(self.backbone, edits)]
        return self.draw(seeds, rule.conditionings(self.unconditional(), *conditions), rule)

    def _composed(self, concept: str, scale: float, seeds: Sequence[int]) -> Tensor:
        rule = SummedGuidance([self.guidance.guidance_scale, scale])
        conditions = [self.backbone.encode_prompts([text]) for text in (self.prompt, concept)]
        return self.draw(seeds, rule.conditionings(self.unconditional(), *conditions), rule)

    def _safe(self, prompt: str, concept: str, seeds: Sequence[int]) -> Tensor:
        rule = SafeGuidance(self.guidance.guidance_scale, self.safety)
        conditions = [self.backbone.encode_prompts([text]) for text in (prompt, concept)]
        return self.draw(seeds, rule.conditionings(self.unconditional(), *conditions), rule)

    def _timed(self, kind: int, seeds: Sequence[int], draw: Callable[[], Tensor]) -> Tensor:
        """What ``draw`` draws for seeds; its time per picture is that of a kind of pictures."""
        images, together = timed(draw, self.device)
        seconds = torch.full((len(seeds),), together / len(seeds), device=images.device)
        self.seconds.update(seconds, torch.full_like(seconds, kind, dtype=torch.long))
        return images

    def on_test_epoch_end(self) -> None:
        """Make the report, and log its figures."""
        success, kept = (metric.compute().reshape(*self._cells, 2).cpu() for metric in (self.success, self.kept))
        seconds = self.seconds.compute().cpu()
        columns = ["attribute"]
        rows: list[list[str | float | None]] = [[attribute.name] for attribute in self.attributes]
        plain: list[str] = []
        summary: dict[str, float] = {}
        for method, name in enumerate(_METHODS):
            if not success[method, ..., 1].any():
                continue
            prefix = "" if method == 0 else f"{name.replace(' ', '_')}_"
            for side, what in enumerate(_SIDES):
                columns += interval_columns(f"{prefix}{what}")
                for row, counts in zip(rows, success[method, :, side].tolist(), strict=True):
                    row += interval_cells(*counts)
                plain += [f"{prefix}{what}"] if method else []
                summary[f"{prefix}{what}_success"] = mean_share(success[method, :, side])
                summary[f"{prefix}{what}_untouched_kept"] = mean_share(kept[method, :, side])
            columns.append(f"{prefix}untouched_kept")
            plain.append(f"{prefix}untouched_kept")
            for row, counts in zip(rows, kept[method].sum(dim=1).tolist(), strict=True):
                row.append(interval_cells(*counts)[0])
            summary[f"{prefix}untouched_kept"] = mean_share(kept[method].sum(dim=1))
            summary[f"{prefix}seconds"] = float(seconds[1 + method])
        summary["plain_seconds"] = float(seconds[0])
        for name, ranks in self.ranks.compute().items():
            columns.append(name)
            plain.append(name)
            for row, rank in zip(rows, ranks.tolist(), strict=True):
                row.append(None if math.isnan(rank) else rank)
            summary[name] = float(ranks.nanmean())
        for name, counts in self._more(summary):
            cells = interval_cells(*counts)
            rows.append([name, *cells, *[None] * (len(columns) - 1 - len(cells))])
        self.log_dict({f"test/{name}": value for name, value in summary.items()}, rank_zero_only=True)
        self.report = Report(
            title=f"semantic guidance judged by {self.judge.pretrained}",
            columns=columns,
            rows=rows,
            bars=list(_SIDES),
            plain=plain,
            summary=summary,
            pictures={"edits": self.shown.rows()},
        )

    def _more(self, summary: dict[str, float]) -> Iterator[tuple[str, list[int]]]:
        """Rows of one count each: their names and (correct, total); the figures go to the summary."""
        at_least, each = self.at_least.compute(), self.each.compute()
        for number, (name, parts) in enumerate(zip(self.combination_names, self.combinations, strict=True)):
            first = number * self._most
            for index in range(len(parts)):
                yield f"{name}: at least {index + 1}", at_least[first + index].tolist()
            for index, part in enumerate(name.split(" + ")):
                yield f"{name}: {part}", each[first + index].tolist()
            summary[f"combination_{number + 1}_all"] = mean_share(at_least[first + len(parts) - 1, None])
        in_styles, kept_in_styles = self.in_styles.compute(), self.kept_in_styles.compute()
        for style, counts in zip(self.styles, in_styles.tolist(), strict=False):
            yield style, counts
        if self.styles and self.style_seeds:
            summary["styles_add_success"] = mean_share(in_styles)
            summary["styles_untouched_kept"] = mean_share(kept_in_styles)
        if self.arithmetic is not None:
            ways = {"arithmetic_plain": "plain", "arithmetic": self.arithmetic.concept}
            for (key, way), counts in zip(ways.items(), self.turned.compute(), strict=True):
                yield f"{self.arithmetic.label}: {way}", counts.tolist()
                summary[key] = mean_share(counts[None])
        if self.suppression is not None:
            ways = {"suppression_plain": "plain", "suppression": _OWN, "suppression_safe": _SAFE}
            for (key, way), counts in zip(ways.items(), self.suppressed.compute(), strict=True):
                yield f"{self.suppression.label} shown: {way}", counts.tolist()
                summary[key] = mean_share(counts[None])
