"""Prompts and seeds: images to generate by specification, the same on any number of devices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import lightning as L

from tokenlearn.data.batches import PromptBatch, PromptKind
from tokenlearn.data.interfaces import ClassConsumer, PromptTemplates, WholePrompts, consumer_of, trainer_of
from tokenlearn.data.sources import CountingSource, Item, items_below
from tokenlearn.data.streams import BatchStream, EvaluationBatches
from tokenlearn.errors import UserError, check_at_least, check_seeds, check_template

VALIDATION_SEEDS = 1_000_000_000
"""Seed of the first image of a validation; training seeds are below."""

TEST_SEEDS = 2_000_000_000
"""Seed of the first image of a test."""


class PromptSample(NamedTuple):
    """One image of a :class:`tokenlearn.data.PromptBatch`; see there."""

    template: str
    seed: int
    class_index: int
    kind: PromptKind


def collate_prompts(samples: Sequence[PromptSample]) -> PromptBatch:
    """A batch of samples."""
    return PromptBatch(
        [sample.template for sample in samples],
        [sample.seed for sample in samples],
        [sample.class_index for sample in samples],
        [sample.kind for sample in samples],
    )


def prompt_stream(
    templates: Sequence[str],
    num_classes: int,
    *,
    batch_size: int,
    length: int,
    first_seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> BatchStream[PromptSample, PromptBatch]:
    """An endless stream of training samples for class tokens.

    Sample ``i`` is of class ``i % num_classes`` and has seed ``first_seed + i``, so classes are balanced and no noise
    occurs twice.

    Args:
        templates: prompts with ``{}`` where the class goes; the samples of a class take them in turn.
        num_classes: number of classes.
        batch_size: samples per batch and rank.
        length: batches per epoch and rank.
        first_seed: seed of the first sample.
        rank: this process among ``world_size``.
        world_size: number of processes.
    """

    def load(item: Item) -> PromptSample:
        template = templates[item.index // num_classes % len(templates)]
        return PromptSample(template, first_seed + item.index, item.index % num_classes, "token")

    return BatchStream(
        CountingSource(),
        load,
        collate_prompts,
        batch_size=batch_size,
        length=length,
        rank=rank,
        world_size=world_size,
    )


class PromptDataModule(L.LightningDataModule, PromptTemplates):
    """Prompts and seeds for learning class tokens.

    Training seeds count up from ``seed``. Validation and test have fixed seeds far away from them, the same for every
    class and kind of prompt, so that images before and after can be compared one to one.

    Args:
        templates: prompts with ``{}`` where the class goes.
        batch_size: images per step and device.
        batches_per_epoch: steps between validations, per device.
        seed: seed of the first training image, 0 to 999999999.
        validation_images: images per class in each validation.
        test_images: images per class and kind of prompt in the test.
        test_kinds: kinds of prompt to test: ``name``, ``word`` (the best single word of the vocabulary, which is
            searched for), ``described``, ``start`` (the words that the token started from) and ``token``. A class
            without a description is left out of ``described``.
        eval_batch_size: images per step and device in validation and test; null for ``batch_size``, so that they fit
            where the training does.

    Raises:
        UserError: for a template without ``{}``, an empty list or a number below 1.
    """

    def __init__(
        self,
        templates: list[str],
        batch_size: int = 8,
        batches_per_epoch: int = 10,
        seed: int = 0,
        validation_images: int = 8,
        test_images: int = 32,
        test_kinds: list[PromptKind] = ["name", "described", "start", "token"],  # noqa: B006 - as YAML shows it
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not templates:
            raise UserError("data.templates is empty; give at least one, such as 'a portrait of a {}'")
        for template in templates:
            check_template(template, "data.templates", "class")
        check_at_least(
            "data",
            1,
            batch_size=batch_size,
            batches_per_epoch=batches_per_epoch,
            validation_images=validation_images,
            test_images=test_images,
            eval_batch_size=eval_batch_size,
        )
        if not 0 <= seed < VALIDATION_SEEDS:
            raise UserError(f"data.seed must be from 0 to {VALIDATION_SEEDS - 1}, got {seed}")
        self._templates, self.batch_size, self.batches_per_epoch = templates, batch_size, batches_per_epoch
        self.seed, self.eval_batch_size = seed, eval_batch_size or batch_size
        self.validation_images, self.test_images, self.test_kinds = validation_images, test_images, test_kinds

    @property
    def templates(self) -> Sequence[str]:
        """Prompts with ``{}`` where the class goes."""
        return self._templates

    def train_dataloader(self) -> BatchStream[PromptSample, PromptBatch]:
        """The training stream, this rank's part."""
        trainer = trainer_of(self)
        return prompt_stream(
            self.templates,
            len(self._descriptions()),
            batch_size=self.batch_size,
            length=self.batches_per_epoch,
            first_seed=self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def val_dataloader(self) -> EvaluationBatches[PromptSample, PromptBatch]:
        """Prompts with the tokens, on seeds of the validation."""
        return self._evaluation(VALIDATION_SEEDS, self.validation_images, ["token"])

    def test_dataloader(self) -> EvaluationBatches[PromptSample, PromptBatch]:
        """Every kind of prompt, on seeds of the test."""
        return self._evaluation(TEST_SEEDS, self.test_images, self.test_kinds)

    def _evaluation(
        self, first_seed: int, images: int, kinds: Sequence[PromptKind]
    ) -> EvaluationBatches[PromptSample, PromptBatch]:
        samples = [
            PromptSample(self.templates[image % len(self.templates)], first_seed + image, class_index, kind)
            for kind in kinds
            for class_index, description in enumerate(self._descriptions())
            for image in range(images)
            if kind != "described" or description is not None
        ]
        return _evaluation_batches(samples, self.eval_batch_size, trainer_of(self))

    def _descriptions(self) -> list[str | None]:
        return list(consumer_of(trainer_of(self), ClassConsumer).class_descriptions.values())


class PromptList(L.LightningDataModule, WholePrompts):
    """Whole prompts to generate, each with every seed.

    Args:
        prompts: prompts, with placeholder tokens if wanted.
        seeds: seeds of the initial latents; the same as ``torch.Generator().manual_seed(seed)`` in diffusers.
        batch_size: images per step and device.

    Raises:
        UserError: for an empty list, or a number that is out of range.
    """

    def __init__(self, prompts: list[str], seeds: list[int] = [0], batch_size: int = 8) -> None:  # noqa: B006 - as above
        super().__init__()
        if not prompts or not seeds:
            raise UserError(f"data.{'seeds' if prompts else 'prompts'} is empty; give at least one")
        check_at_least("data", 1, batch_size=batch_size)
        check_seeds("data.seeds", seeds)
        self.prompts, self.seeds, self.batch_size = prompts, seeds, batch_size

    def predict_dataloader(self) -> EvaluationBatches[PromptSample, PromptBatch]:
        """All prompts with all seeds, this rank's part."""
        samples = [
            PromptSample(prompt, seed, index, "token")
            for index, prompt in enumerate(self.prompts)
            for seed in self.seeds
        ]
        return _evaluation_batches(samples, self.batch_size, self.trainer)


def _evaluation_batches(
    samples: Sequence[PromptSample], batch_size: int, trainer: L.Trainer | None
) -> EvaluationBatches[PromptSample, PromptBatch]:
    """This rank's part of samples; without a trainer, all of them."""
    return EvaluationBatches(
        partial(items_below, len(samples)),
        len(samples),
        lambda item: samples[item.index],
        collate_prompts,
        batch_size=batch_size,
        rank=trainer.global_rank if trainer else 0,
        world_size=trainer.world_size if trainer else 1,
    )
