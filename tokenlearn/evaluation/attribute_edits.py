"""Evaluation of tokens that stand for attributes: held-out images are edited, and a judge looks at the edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tokenlearn.data.batches import ImageBatch
from tokenlearn.data.interfaces import DrawnImages, LabelledImages, find_data
from tokenlearn.editing import Editing, ImageEditor, source_of
from tokenlearn.errors import UserError
from tokenlearn.evaluation.base import Evaluation
from tokenlearn.evaluation.edit_protocol import Conditions, EditProtocol, Removal, directions_of
from tokenlearn.evaluation.edit_table import edit_table
from tokenlearn.evaluation.ledits import LEditsPP, LEditsPPEditor, word_edits
from tokenlearn.evaluation.records import Record
from tokenlearn.evaluation.table import Table
from tokenlearn.models import TimmClassifier
from tokenlearn.models.attributes import resolve_attributes
from tokenlearn.pipeline import Pipeline
from tokenlearn.tokens import Embeddings, TokenBank, load_bank, vocabulary_norm_range
from tokenlearn.tokens.directions import PairTemplates, find_direction
from tokenlearn.training.caso import Caso

_OTHER_IMAGES = "other pictures"  # a row of tables


class AttributeEdits(Evaluation[Caso]):
    """Success and side effects of edits by the tokens of attributes, beside other ways to make the same edits.

    Held-out images are inverted and edited in every direction, at several strengths. The judge sees whether the
    attribute changed, and whether the other attributes did not. The data are those of the task, such as
    ``ImageDataModule`` with ``held_out.test`` and, for groups of other images, ``held_out.transfer``.

    Args:
        editing: settings of inversion and denoising.
        strengths: guidance scales of the curves.
        strength: guidance scale of the table, one of ``strengths``.
        removal: how classes are removed: by the class's token at a negative scale (``negative``), towards the opposite
            class, where an attribute has two (``opposite``), or by half of each, so that the common part of both
            tokens cancels (``difference``).
        prompts: class to a prompt that asks for it; adds the method prompt editing.
        directions: how pairs of prompts are made from these prompts; adds the method direction, which needs no
            training: the difference of the text encoder's mean outputs, added to its output for the source prompt,
            and taken away from it for the opposite class. Null leaves it out.
        direction_units: natural units of a direction that are added. One unit, the mean difference of the prompts, is
            weak without the prompt that it comes from.
        embeddings: embedding files of textual inversion, with the class in their metadata; adds this method.
        ledits: settings of LEDITS++, which edits by words alone; adds this method. Null leaves it out.
        random_tokens: whether to add random tokens as a method.
        watched: labels of the judge that edits should leave alone, besides the task's attributes.
        combinations: classes to change in one edit.
        group_column: label of the images that names the groups of other images, such as ``style``.
        equal_preservation: share of other attributes that stay, such as 0.93, at which methods are compared, each at
            the strength that has it, interpolated between ``strengths``; null leaves these rows out.

    Raises:
        UserError: if ``strength`` is not among ``strengths``, a strength or the units are not positive, there are
            directions without prompts, or the share is not between 0 and 1.
    """

    task_class = Caso

    def __init__(
        self,
        *,
        editing: Editing = Editing(timestep=601, steps=20),  # noqa: B008 - frozen
        strengths: list[float] = [2.0, 4.0, 6.0],  # noqa: B006 - read only; a list is what YAML shows
        strength: float = 4.0,
        removal: Removal = "negative",
        prompts: dict[str, str] = {},  # noqa: B006 - read only
        directions: PairTemplates | None = None,
        direction_units: float = 1.0,
        embeddings: Embeddings = [],  # noqa: B006 - read only
        ledits: LEditsPP | None = None,
        random_tokens: bool = True,
        watched: list[str] = [],  # noqa: B006 - read only
        combinations: list[list[str]] = [],  # noqa: B006 - read only
        group_column: str | None = None,
        equal_preservation: float | None = None,
    ) -> None:
        super().__init__()
        if equal_preservation is not None and not 0 < equal_preservation < 1:
            raise UserError(
                f"evaluation.equal_preservation must be above 0 and below 1, such as 0.93, got {equal_preservation:g}"
            )
        if not strengths or min(strengths) <= 0:
            raise UserError(f"evaluation.strengths must be positive numbers, at least one, got {strengths}")
        if strength not in strengths:
            raise UserError(
                f"evaluation.strength {strength} is not among evaluation.strengths {strengths}; add it there"
            )
        self.editing, self.strengths, self.strength, self.removal = editing, strengths, strength, removal
        if directions is not None and not prompts:
            raise UserError("evaluation.directions needs a prompt for each class; give them in evaluation.prompts")
        if direction_units <= 0:
            raise UserError(f"evaluation.direction_units must be above 0, got {direction_units:g}")
        self.directions, self.direction_units = directions, direction_units
        self.prompts, self.embeddings, self.random_tokens = prompts, embeddings, random_tokens
        self.ledits = ledits
        self.watched, self.combinations, self.group_column = watched, combinations, group_column
        self.equal_preservation = equal_preservation
        self.groups: tuple[str, ...] = ()
        self._protocol: EditProtocol | None = None

    def on_test_start(self) -> None:
        """Encode the conditions of the edits.

        Raises:
            UserError: without a judge, or if the settings do not fit the task, the data or the backbone.
        """
        super().on_test_start()
        task, judge = self.task, self._judge()
        self.groups = self._groups()
        class_names = [name for attribute in task.attributes for name in attribute.class_names]
        watched = {name: None for name in self.watched if name not in class_names}
        self._protocol = EditProtocol(
            editor=ImageEditor(task.backbone, self.editing, setting="evaluation.editing"),
            source=source_of(task.pipeline, self.editing),
            conditions=self.conditions(),
            attributes=task.judge_attributes,
            watched=resolve_attributes(watched, judge),
            judge=judge,
            strengths=self.strengths,
            strength=self.strength,
            removal=self.removal,
            combinations=self.combinations,
            records=self.records,
            image_rows=self.image_rows,
            ledits=None if self.ledits is None else self._ledits_editor(self.ledits),
        )

    @torch.no_grad()
    def test_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Edit held-out images, or with the second dataloader images of other groups, and judge them."""
        assert self._protocol is not None
        latents = self.task.clean_latents(batch)
        images = self.task.clean_images(batch, latents)
        if dataloader_idx == 0:
            self._protocol.measure(images, latents, batch.names, self._masks(batch.names, images))
        else:
            self._protocol.measure_transfer(images, latents, batch.names, self._groups_of(batch))

    def on_test_epoch_end(self) -> None:
        """Make the table, log its summary, and free the encoded conditions."""
        super().on_test_epoch_end()
        self._protocol = None

    def make_table(self, records: list[Record]) -> Table:
        """See :class:`Evaluation`: a row per direction, columns of each method."""
        assert self._protocol is not None
        table = edit_table(
            records,
            title=f"edits judged by {self._judge().pretrained}",
            methods=self._protocol.methods,
            directions=[direction.name for direction in self._protocol.directions],
            combinations=self.combinations,
            groups=self.groups,
            strengths=self.strengths,
            strength=self.strength,
            equal_preservation=self.equal_preservation,
        )
        table.images = {"edits": self.image_rows.rows()}
        return table

    @torch.no_grad()
    def conditions(self) -> dict[str, list[Conditions]]:
        """Method to its encoded conditions for each direction, the task's tokens first.

        Raises:
            UserError: if a method has no prompt for a class.
        """
        task = self.task
        tokens = {
            name: task.prompt(token)
            for attribute in task.attributes
            for name, token in zip(attribute.class_names, attribute.placeholders, strict=True)
        }
        conditions = {"caso": self._encoded(task.pipeline, tokens, "the task")}
        if self.prompts:
            conditions["prompt editing"] = self._encoded(task.pipeline, self.prompts, "evaluation.prompts")
        if self.directions is not None:
            conditions["direction"] = self._of_directions(self.directions)
        if self.embeddings:
            bank, files = load_bank(self.embeddings, task.backbone.embedding_widths, task.backbone.word_tables)
            prompts = {
                file.metadata.get("class", file.token): file.metadata.get("prompt", file.token) for file in files
            }
            pipeline = task.pipeline.with_tokens(bank)
            conditions["textual inversion"] = self._encoded(pipeline, prompts, "evaluation.embeddings")
        if self.random_tokens:
            pipeline = task.pipeline.with_tokens(self.random_bank())
            conditions["random token"] = self._encoded(pipeline, tokens, "the task")
        return conditions

    def random_bank(self) -> TokenBank:
        """Random tokens with the names of the task's tokens: Gaussian vectors of the usual length of words.

        Those of the output space, where words have no place, are as long as the task's.
        """
        learned = self.task.bank
        assert learned is not None
        generator = torch.Generator().manual_seed(self.task.seed)
        bank = TokenBank(learned.num_vectors, learned.embedding_widths, learned.spaces)
        lengths = [sum(vocabulary_norm_range(encoder)) / 2 for encoder in self.task.backbone.text_encoders]
        for token, count in bank.num_vectors.items():
            vectors = [torch.randn(count, width, generator=generator) for width in bank.embedding_widths]
            of_token: Sequence[float | Tensor] = lengths
            if bank.spaces[token] != "input":
                of_token = [part.detach().norm(dim=1, keepdim=True).cpu() for part in learned.get(token)]
            bank.set(
                token, [length * functional.normalize(part) for length, part in zip(of_token, vectors, strict=True)]
            )
        return bank

    def _judge(self) -> TimmClassifier:
        if self.task.judge is None:
            raise UserError("the evaluation needs a classifier that did not train the tokens; set model.judge")
        return self.task.judge

    def _encoded(self, pipeline: Pipeline, prompts: Mapping[str, str], source: str) -> list[Conditions]:
        """Conditions of each direction, from prompts by class."""
        encoded: list[Conditions] = []
        for direction in directions_of(self.task.attributes):
            if direction.name not in prompts:
                raise UserError(
                    f"{source} has no prompt for class '{direction.name}', only for {', '.join(prompts)}; add it"
                )
            names = self.task.attributes[direction.attribute].class_names
            opposite = prompts.get(names[0]) if len(names) == 2 else None
            encoded.append(
                Conditions(
                    pipeline.encode([prompts[direction.name]]),
                    None if opposite is None else pipeline.encode([opposite]),
                )
            )
        return encoded

    def _of_directions(self, templates: PairTemplates) -> list[Conditions]:
        """Conditions of each direction: the source moved by natural units, forwards and backwards."""
        task = self.task
        source, encoded = source_of(task.pipeline, self.editing), []
        for direction in directions_of(task.attributes):
            others = [name for name in task.attributes[direction.attribute].class_names if name != direction.name]
            found = find_direction(task.pipeline, *templates.pairs(direction.name, others, self.prompts))
            step = self.direction_units * found.unit * found.vector[None]
            moved = [task.backbone.add_to_outputs(source, sign * step, "output") for sign in (1, -1)]
            encoded.append(Conditions(*moved))
        return encoded

    def _ledits_editor(self, settings: LEditsPP) -> LEditsPPEditor:
        """LEDITS++ in every direction."""
        opposites: list[tuple[str, str | None]] = []
        for direction in directions_of(self.task.attributes):
            names = self.task.attributes[direction.attribute].class_names
            opposites.append((direction.name, names[0] if len(names) == 2 else None))
        return LEditsPPEditor(self.task.backbone, settings, word_edits(settings.words, opposites))

    def _masks(self, names: Sequence[str], images: Tensor) -> dict[str, Tensor]:
        """Direction to the pixels (B, H, W) that it decides in images (B, 3, H, W), if these are drawn portraits."""
        data = find_data(self.trainer, DrawnImages)
        if data is None or not (scenes := data.scenes(names)):
            return {}
        from tokenlearn.data.portraits import ATTRIBUTES, attribute_mask

        masks = {}
        for direction in directions_of(self.task.attributes):
            if direction.name in ATTRIBUTES:
                drawn = np.stack([attribute_mask(scene, direction.name) for scene in scenes])
                resized = functional.interpolate(torch.from_numpy(drawn)[:, None].float(), images.shape[-2:])
                masks[direction.name] = (resized[:, 0] > 0).to(images.device)
        return masks

    def _groups(self) -> tuple[str, ...]:
        """Names of the groups of other images."""
        if self.group_column is None:
            return (_OTHER_IMAGES,)
        data = find_data(self.trainer, LabelledImages)
        known = {} if data is None else data.class_names
        if self.group_column not in known:
            raise UserError(
                f"the data have no label '{self.group_column}' (evaluation.group_column), only "
                f"{', '.join(known) or 'none'}; name its column in data.labels.columns"
            )
        return known[self.group_column]

    def _groups_of(self, batch: ImageBatch) -> Sequence[str]:
        """The group of each image of a batch; empty where it is not known."""
        if self.group_column is None:
            return self.groups * len(batch.names)
        labels: Tensor | None = batch.labels.get(self.group_column)
        indices = [-1] * len(batch.names) if labels is None else labels.tolist()
        return [self.groups[index] if index >= 0 else "" for index in indices]
