"""Evaluation of semantic guidance: the tables of SEGA's paper (https://arxiv.org/abs/2301.12247) in small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tokenlearn.data.sources import items_below
from tokenlearn.data.streams import EvaluationBatches
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.evaluation.base import Evaluation
from tokenlearn.evaluation.realism import Realism
from tokenlearn.evaluation.records import Record
from tokenlearn.evaluation.sega_methods import (
    METHODS,
    PLAIN,
    SAFE,
    SEMANTIC,
    VARIANT,
    Request,
    Side,
    concept_edit,
    edit_requests,
    semantic_edit,
    variant_item,
)
from tokenlearn.evaluation.sega_settings import (
    Arithmetic,
    AttributeWords,
    Monotonicity,
    Seeds,
    SegaMethods,
    SegaVariant,
    Styles,
    Suppression,
)
from tokenlearn.evaluation.sega_table import REALISM, sega_table
from tokenlearn.evaluation.table import Table
from tokenlearn.generation.generate import Generate
from tokenlearn.guidance import SEGA, ClassifierFreeGuidance, SafeGuidance, SemanticEdit, check_tokens
from tokenlearn.metrics import GroupFeatures, kernel_distance, rank_correlation, timed
from tokenlearn.models import DiffusionBackbone, TimmClassifier
from tokenlearn.models.attributes import resolve_attributes
from tokenlearn.pipeline import Sampling
from tokenlearn.tokens import Embeddings


class _Part(NamedTuple):
    """A part of a combination: index of the attribute, whether it is to be present, and a particular edit or None."""

    attribute: int
    wanted: bool
    edit: SemanticEdit | None


class SegaEvaluation(Evaluation[Generate]):
    """Success of semantic guidance and its side effects, beside other methods of the same effect.

    Images of a neutral prompt are generated from fixed seeds. Each attribute is added to the images that lack it and,
    if it is removable, removed from the images that show it. The judge sees which images show an attribute, and counts
    successes and untouched attributes. A config of this evaluation has no data section; run it by ``tokenlearn test``.

    Args:
        backbone: frozen diffusion model.
        judge: timm name or folder of the classifier that judges, or a loaded classifier.
        attributes: attributes of the judge and how each method asks for them.
        prompt: neutral prompt.
        methods: settings of the compared methods.
        variants: semantic guidance with other settings, such as without momentum: a row each, over all attributes.
        combinations: attributes to change together, in images that need all of the changes. Each goes with its edit,
            or null for the edit that changes it alone; ``no smile`` asks for absence.
        styles: further prompts, to whose images attributes are added.
        arithmetic: a sum of concepts, or null.
        suppression: something that a prompt brings along unwanted, or null.
        monotonicity: rank correlation of the judge's logit with the scale. ``rank_correlation`` is over the side of
            the scales that an image needs, ``both_sides_rank_correlation`` over all.
        seeds: seeds of the images.
        realism: distance of the plain images, and of each method's edits of the seeds that all methods edit, to real
            images; or null.
        embeddings: embedding files of learned tokens.
        sampling: settings of the sampler; its guidance is the scale of classifier-free guidance.
        batch_size: images at once.

    Raises:
        UserError: if the judge lacks a label, a combination has an unknown attribute, or a number is out of range.
    """

    task_class = Generate

    def __init__(
        self,
        backbone: DiffusionBackbone,
        judge: str | TimmClassifier,
        attributes: list[AttributeWords],
        *,
        prompt: str,
        methods: SegaMethods = SegaMethods(),  # noqa: B008 - frozen
        variants: list[SegaVariant] = [],  # noqa: B006 - read only
        combinations: list[dict[str, SemanticEdit | None]] = [],  # noqa: B006 - read only; a list is what YAML shows
        styles: Styles = Styles(),  # noqa: B008 - frozen
        arithmetic: Arithmetic | None = None,
        suppression: Suppression | None = None,
        monotonicity: Monotonicity = Monotonicity(),  # noqa: B008 - frozen
        seeds: Seeds = Seeds(),  # noqa: B008 - frozen
        realism: Realism | None = None,
        embeddings: Embeddings = [],  # noqa: B006 - read only
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        batch_size: int = 10,
    ) -> None:
        super().__init__()
        if not attributes:
            raise UserError("model.attributes is empty; give at least one, such as {label: smile, concept: smile}")
        check_at_least("model", 1, batch_size=batch_size)
        if not isinstance(sampling.guidance, int | float):
            raise UserError(
                f"model.sampling.guidance must be the scale of classifier-free guidance, got "
                f"{type(sampling.guidance).__name__}; the evaluation makes all rules itself"
            )
        self.of(Generate(backbone, embeddings=embeddings, sampling=sampling))
        self.scale, self.steps = float(sampling.guidance), sampling.steps
        self.judge = TimmClassifier(judge) if isinstance(judge, str) else judge
        if len({variant.name for variant in variants}) < len(variants):
            names = ", ".join(variant.name for variant in variants)
            raise UserError(f"model.variants has a name twice among {names}; give each variant its own")
        self.words, self.prompt, self.methods, self.variants = attributes, prompt, methods, variants
        self.attributes = resolve_attributes({words.label: None for words in attributes}, self.judge)
        self.combinations = {" + ".join(parts): self._parts(parts) for parts in combinations}
        self.styles, self.arithmetic, self.suppression = styles, arithmetic, suppression
        self.monotonicity, self.seeds, self.batch_size = monotonicity, seeds, batch_size
        self.arithmetic_judge = None if arithmetic is None else TimmClassifier(arithmetic.judge)
        if arithmetic is not None and self.arithmetic_judge is not None:
            (self._expected,) = resolve_attributes({arithmetic.label: None}, self.arithmetic_judge)
        if suppression is not None:
            (self._unwanted,) = resolve_attributes({suppression.label: None}, self.judge)
        self.realism = realism
        self.realism_judge = None if realism is None else TimmClassifier(realism.judge)
        self.real_features: Tensor | None = None
        self.features = GroupFeatures(len(METHODS) * len(self.attributes))
        for edit in self._edits():
            SEGA([edit]).check_steps(sampling.steps)

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

    def _edits(self) -> list[SemanticEdit]:
        """Edits with the settings and the concepts of the whole evaluation."""
        methods, further = self.methods, self.monotonicity.edit
        varied = [chosen for variant in self.variants for chosen in (variant.add, variant.remove)]
        given = (methods.add, methods.remove, methods.tokens, further, *varied)
        settings = [chosen for chosen in given if chosen is not None]
        edits = [concept_edit(words.concept, chosen) for words in self.words for chosen in settings]
        edits += [concept_edit(words.opposite, methods.add) for words in self.words if words.opposite is not None]
        if methods.tokens is not None:
            tokens = [token for words in self.words for token in (words.token, words.opposite_token)]
            edits += [concept_edit(token, methods.tokens) for token in tokens if token is not None]
        edits += [part.edit for parts in self.combinations.values() for part in parts if part.edit is not None]
        sums = [part.concept for part in (self.arithmetic, self.suppression) if part is not None]
        return edits + [concept_edit(concept, methods.add) for concept in sums]

    def on_test_start(self) -> None:
        """Check that every learned token is loaded.

        Raises:
            UserError: if one is not.
        """
        super().on_test_start()
        check_tokens([edit.concept for edit in self._edits()], self.task.learned_placeholders)
        self.features.reset()
        if self.realism is not None and self.realism_judge is not None:
            self.real_features = self.realism.features(self.realism_judge, self.task.image_size)

    def test_dataloader(self) -> EvaluationBatches[int, list[int]]:
        """This rank's part of the seeds, numbered from 0."""
        return EvaluationBatches(
            partial(items_below, self.seeds.number),
            self.seeds.number,
            lambda item: item.index,
            list,
            batch_size=self.batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    @torch.no_grad()
    def test_step(self, batch: list[int]) -> None:
        """Generate the images of a batch of seeds, plain and edited in all ways, and judge them."""
        seeds = [self.seeds[index] for index in batch]
        compared = [index < self.seeds.compared for index in batch]
        plain = self._generate_timed(PLAIN, self._plain(self.prompt), seeds)
        self.image_rows.add(PLAIN, plain)
        before = self.classes(plain)
        edited = torch.tensor(compared, device=before.device)
        self._add_features(PLAIN, 0, plain[edited])
        self._measure_edits(seeds, before, edited)
        for variant in self.variants:
            self._measure_variant(variant, _chosen(seeds, edited), before[edited])
        for name, parts in self.combinations.items():
            self._measure_combination(name, parts, seeds, before)
        ranked = torch.tensor([index < self.monotonicity.seeds for index in batch], device=before.device)
        self._measure_ranks(_chosen(seeds, ranked), before[ranked])
        if first := [seed for seed, index in zip(seeds, batch, strict=True) if index < self.styles.seeds]:
            for style in self.styles.prompts:
                self._measure_style(style, first)
        if first := [seed for seed, chosen in zip(seeds, compared, strict=True) if chosen]:
            self._measure_arithmetic(first)
            self._measure_suppression(first)

    def classes(self, images: Tensor) -> Tensor:
        """Whether (B, attributes) the judge sees each attribute in images (B, 3, H, W)."""
        outputs = self.judge(images)
        return torch.stack([attribute.class_index(outputs) for attribute in self.attributes], dim=1).bool()

    def generate(self, request: Request, seeds: Sequence[int]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of B seeds."""
        pipeline = self.task.pipeline
        model = pipeline.guided_model(pipeline.encode([request.prompt]), request.rule)
        return pipeline.backbone.decode_latents(pipeline.sample_latents(seeds, model)).clamp(0, 1)

    def _plain(self, prompt: str) -> Request:
        return Request(prompt, ClassifierFreeGuidance(self.scale))

    def _guided(self, prompt: str, edits: Sequence[SemanticEdit]) -> Request:
        return Request(prompt, SEGA(list(edits), self.scale))

    def _generate_timed(self, method: str, request: Request, seeds: Sequence[int]) -> Tensor:
        images, together = timed(partial(self.generate, request, seeds), self.device)
        self.records.update("seconds", torch.full((len(seeds),), together / len(seeds)), seeds, method=method)
        return images

    def _measure_edits(self, seeds: Sequence[int], before: Tensor, compared: Tensor) -> None:
        """Add each attribute where it is absent and remove it where it is present, by every method."""
        for number, words in enumerate(self.words):
            sides: tuple[Side, ...] = ("add", "remove") if words.removable else ("add",)
            for side in sides:
                needed = before[:, number] == (side == "remove")
                requests = edit_requests(
                    words, side, prompt=self.prompt, guidance_scale=self.scale, methods=self.methods
                )
                for method, request in requests.items():
                    rows = needed if method == SEMANTIC else needed & compared
                    if not (chosen := _chosen(seeds, rows)):
                        continue
                    edited = self._generate_timed(method, request, chosen)
                    item = self.attributes[number].name
                    self._record_edit(edited, before[rows], chosen, number, method=method, item=item, side=side)
                    self._add_features(method, number, edited[compared[rows]])
                    if method == SEMANTIC:
                        self.image_rows.add(self.attributes[number].class_names[side == "add"], edited)

    def _measure_variant(self, variant: SegaVariant, seeds: Sequence[int], before: Tensor) -> None:
        """Add and remove each attribute by a variant of semantic guidance."""
        for number, words in enumerate(self.words):
            sides: tuple[Side, ...] = ("add", "remove") if words.removable else ("add",)
            for side in sides:
                rows = before[:, number] == (side == "remove")
                if chosen := _chosen(seeds, rows):
                    request = self._guided(self.prompt, [semantic_edit(words, side, variant)])
                    item = variant_item(variant.name)
                    self._record_edit(
                        self.generate(request, chosen),
                        before[rows],
                        chosen,
                        number,
                        method=VARIANT,
                        item=item,
                        side=side,
                    )

    def _record_edit(
        self, edited: Tensor, before: Tensor, seeds: Sequence[int], number: int, *, method: str, item: str, side: Side
    ) -> None:
        """Record whether an attribute changed, and which of the others did not."""
        unchanged = self.classes(edited) == before
        for index, attribute in enumerate(self.attributes):
            measure, values = ("kept", unchanged[:, index]) if index != number else ("success", ~unchanged[:, index])
            self.records.update(measure, values, seeds, method=method, item=item, side=side, label=attribute.name)

    def _measure_combination(self, name: str, parts: Sequence[_Part], seeds: Sequence[int], before: Tensor) -> None:
        """Change several attributes in one edit, in the images that need all of the changes."""
        wanted = torch.tensor([part.wanted for part in parts], device=before.device)
        columns = [part.attribute for part in parts]
        chosen = _chosen(seeds, (before[:, columns] != wanted).all(dim=1))
        if not chosen:
            return
        edits = [
            part.edit or semantic_edit(self.words[part.attribute], "add" if part.wanted else "remove", self.methods)
            for part in parts
        ]
        edited = self.generate(self._guided(self.prompt, edits), chosen)
        reached = self.classes(edited)[:, columns] == wanted
        self.image_rows.add(name, edited)
        record = partial(self.records.update, seeds=chosen, method=SEMANTIC, item=name)
        for index, part in enumerate(name.split(" + ")):
            record("parts", reached.sum(dim=1) > index, label=f"at least {index + 1}")
            record("parts", reached[:, index], label=part)

    def _measure_ranks(self, seeds: Sequence[int], before: Tensor) -> None:
        """Rank the judge's logit of each image against the scale of the edit."""
        if not seeds:
            return
        scales = torch.tensor(self.monotonicity.scales, dtype=torch.float32, device=self.device)
        repeated = [seed for seed in seeds for _ in self.monotonicity.scales]
        settings = self.monotonicity.edit or self.methods.add
        for number, (words, attribute) in enumerate(zip(self.words, self.attributes, strict=True)):
            rule = SEGA([concept_edit(words.concept, settings)], self.scale, sample_scales=[scales.repeat(len(seeds))])
            logits = attribute.logits(self.judge(self.generate(Request(self.prompt, rule), repeated)))
            scores = (logits[:, 1] - logits[:, 0]).reshape(len(seeds), len(scales))
            ranks = rank_correlation(scores, scales.expand_as(scores), before[:, number])
            record = partial(self.records.update, seeds=seeds, method=SEMANTIC, item=attribute.name)
            record("rank_correlation", ranks.needed)
            record("both_sides_rank_correlation", ranks.both_sides)

    def _measure_style(self, style: str, seeds: Sequence[int]) -> None:
        """Add each attribute to images of another prompt that lack it."""
        before = self.classes(self.generate(self._plain(style), seeds))
        for number, words in enumerate(self.words):
            rows = ~before[:, number]
            if chosen := _chosen(seeds, rows):
                edits = [semantic_edit(words, "add", self.methods)]
                edited = self.generate(self._guided(style, edits), chosen)
                self._record_edit(edited, before[rows], chosen, number, method=SEMANTIC, item=style, side="add")

    def _measure_arithmetic(self, seeds: Sequence[int]) -> None:
        """Judge images plain and under a sum of concepts."""
        if self.arithmetic is None or self.arithmetic_judge is None:
            return
        prompt, concept = self.arithmetic.prompt, self.arithmetic.concept
        sums = {
            PLAIN: (prompt, self._plain(prompt)),
            SEMANTIC: (concept, self._guided(prompt, [concept_edit(concept, self.methods.add)])),
        }
        for method, (caption, request) in sums.items():
            images = self.generate(request, seeds)
            turned = self._expected.class_index(self.arithmetic_judge(images)) == 1
            self.records.update("arithmetic", turned, seeds, method=method, item=self.arithmetic.label)
            self.image_rows.add(caption, images)

    def _measure_suppression(self, seeds: Sequence[int]) -> None:
        """Judge images plain, and with an unwanted concept removed by semantic guidance and safe diffusion."""
        if self.suppression is None:
            return
        prompt, concept = self.suppression.prompt, self.suppression.concept
        removal = concept_edit(concept, self.methods.remove or self.methods.add, -1)
        ways = {
            PLAIN: (prompt, self._plain(prompt)),
            SEMANTIC: (f"no {concept}", self._guided(prompt, [removal])),
            SAFE: (
                f"no {concept}, safe",
                Request(prompt, SafeGuidance(self.scale, self.methods.safety, concept)),
            ),
        }
        for method, (caption, request) in ways.items():
            images = self.generate(request, seeds)
            seen = self._unwanted.class_index(self.judge(images)) == 1
            self.records.update("suppression", seen, seeds, method=method, item=self.suppression.label)
            self.image_rows.add(caption, images)

    def _add_features(self, method: str, number: int, images: Tensor) -> None:
        """Add a method's edits (B, 3, H, W) of an attribute to those whose distance to real images is measured."""
        if self.realism_judge is not None and len(images):
            group = METHODS.index(method) * len(self.attributes) + number
            groups = torch.full((len(images),), group, device=images.device)
            self.features.update(self.realism_judge.features(images), groups)

    def on_test_epoch_end(self) -> None:
        """Measure the distance of all processes' edits to real images, and make the table."""
        groups = [] if self.real_features is None else self.features.compute()
        if self.real_features is not None and groups and self.trainer.is_global_zero:
            names = [(method, attribute.name) for method in METHODS for attribute in self.attributes]
            for (method, name), found in zip(names, groups, strict=True):
                if len(found) > 1:
                    distance = kernel_distance(found, self.real_features)
                    item = "" if method == PLAIN else name
                    self.records.update(REALISM, distance[None], ["all images"], method=method, item=item)
        super().on_test_epoch_end()

    def make_table(self, records: list[Record]) -> Table:
        """See :class:`Evaluation`."""
        table = sega_table(
            records,
            title=f"semantic guidance judged by {self.judge.pretrained}",
            attributes=[attribute.name for attribute in self.attributes],
            combinations={name: name.split(" + ") for name in self.combinations},
            styles=self.styles,
            arithmetic=self.arithmetic,
            suppression=self.suppression,
            variants=[variant.name for variant in self.variants],
        )
        table.notes.append(f"all by {self.steps} steps at guidance {self.scale:g}")
        if self.seeds.purpose == "choose":
            table.notes.append("on the seeds for choosing settings: not to be reported")
        table.images = {"edits": self.image_rows.rows()}
        return table


def _chosen(seeds: Sequence[int], rows: Tensor) -> list[int]:
    """The seeds of rows (B,) bool."""
    return [seed for seed, chosen in zip(seeds, rows.tolist(), strict=True) if chosen]
