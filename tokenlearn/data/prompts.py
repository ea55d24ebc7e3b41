"""Streams of (prompt, seed): generated images by specification, the same on any number of devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import lightning as L

from tokenlearn.errors import UserError, check_at_least

PromptKind = Literal["name", "described", "token"]
PROMPT_KINDS: tuple[PromptKind, ...] = ("name", "described", "token")

VALIDATION_SEEDS = 1_000_000_000
TEST_SEEDS = 2_000_000_000


class PromptBatch(NamedTuple):
    """A batch of images to generate.

    Attributes:
        templates: B prompts with ``{}`` where the class goes, or whole prompts.
        seeds: B seeds of the initial latents.
        class_indices: B positions in the task's list of classes.
        kinds: B ways of writing the class: by its name, by its description, or with its token.
    """

    templates: list[str]
    seeds: list[int]
    class_indices: list[int]
    kinds: list[PromptKind]


class PromptStream:
    """An endless stream of training samples, cut into epochs of ``length`` batches; a loader for Lightning.

    Sample ``i`` is of class ``i % num_classes`` and has seed ``first_seed + i``, so classes are balanced and no noise
    comes twice. A global batch is ``world_size * batch_size`` samples in a row, of which each rank takes its part: one
    device and several see the same global batches.

    Args:
        templates: prompts with ``{}`` where the class goes; samples of a class go through them in turn.
        num_classes: number of classes.
        batch_size: samples per batch and rank.
        length: batches per epoch and rank.
        first_seed: seed of the first sample.
        rank: this process among ``world_size``.
        world_size: number of processes.
    """

    def __init__(
        self,
        templates: Sequence[str],
        num_classes: int,
        batch_size: int,
        length: int,
        first_seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.templates, self.num_classes = list(templates), num_classes
        self.batch_size, self.length, self.first_seed = batch_size, length, first_seed
        self.rank, self.world_size = rank, world_size
        self.batches_taken = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[PromptBatch]:
        """The rest of the current epoch."""
        while True:
            batch = self._batch(self.batches_taken)
            self.batches_taken += 1
            yield batch
            if self.batches_taken % self.length == 0:
                return

    def _batch(self, position: int) -> PromptBatch:
        start = (position * self.world_size + self.rank) * self.batch_size
        samples = range(start, start + self.batch_size)
        return PromptBatch(
            [self.templates[sample // self.num_classes % len(self.templates)] for sample in samples],
            [self.first_seed + sample for sample in samples],
            [sample % self.num_classes for sample in samples],
            ["token"] * self.batch_size,
        )

    def state_dict(self) -> dict[str, int]:
        """Position, which Lightning keeps in checkpoints."""
        return {"batches_taken": self.batches_taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a saved position."""
        self.batches_taken = state["batches_taken"]


class _Evaluation:
    """Every kind of prompt for every class, with the same seeds: this rank's part, in batches."""

    def __init__(self, samples: Sequence[tuple[str, int, int, PromptKind]], batch_size: int) -> None:
        self.samples, self.batch_size = samples, batch_size

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        for start in range(0, len(self.samples), self.batch_size):
            yield PromptBatch(
                *(list(column) for column in zip(*self.samples[start : start + self.batch_size], strict=True))
            )


def _part(
    samples: Sequence[tuple[str, int, int, PromptKind]], batch_size: int, rank: int, world_size: int
) -> _Evaluation:
    if len(samples) < world_size:  # Lightning skips a process without batches, and the others would wait for it
        raise UserError(f"{len(samples)} images cannot be split among {world_size} devices; lower trainer.devices")
    return _Evaluation(samples[rank::world_size], batch_size)


class PromptDataModule(L.LightningDataModule):
    """Prompts and seeds for learning class tokens.

    Training seeds count up from ``seed``; validation and test have fixed seeds far away from them, the same for every
    class and kind of prompt, so that pictures before and after can be compared one to one.

    Args:
        templates: prompts with ``{}`` where the class goes.
        batch_size: images per step and device.
        batches_per_epoch: steps between validations, per device.
        seed: seed of the first training image, 0 to 999999999.
        validation_images: images per class in each validation.
        test_images: images per class and kind of prompt in the test.
        test_kinds: kinds of prompt to test; a class without a description is left out of ``described``.
        eval_batch_size: images per step and device in validation and test, where no gradient is kept.

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
        test_kinds: list[PromptKind] = list(PROMPT_KINDS),  # noqa: B006 - read only; a list is what YAML shows
        eval_batch_size: int = 32,
    ) -> None:
        super().__init__()
        if not templates:
            raise UserError("data.templates is empty; give at least one, such as 'a portrait of a {}'")
        for template in templates:
            if template.count("{}") != 1:
                raise UserError(f"template '{template}' must have exactly one '{{}}', where the class goes")
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
        self.templates, self.batch_size, self.batches_per_epoch = templates, batch_size, batches_per_epoch
        self.seed, self.eval_batch_size = seed, eval_batch_size
        self.validation_images, self.test_images, self.test_kinds = validation_images, test_images, test_kinds

    def train_dataloader(self) -> PromptStream:
        """The training stream, this rank's part."""
        trainer = self._trainer()
        return PromptStream(
            self.templates,
            len(self._descriptions()),
            self.batch_size,
            self.batches_per_epoch,
            self.seed,
            trainer.global_rank,
            trainer.world_size,
        )

    def val_dataloader(self) -> _Evaluation:
        """Prompts with the tokens on fresh seeds."""
        return self._evaluation(VALIDATION_SEEDS, self.validation_images, ["token"])

    def test_dataloader(self) -> _Evaluation:
        """Every kind of prompt on other fresh seeds."""
        return self._evaluation(TEST_SEEDS, self.test_images, self.test_kinds)

    def _evaluation(self, first_seed: int, images: int, kinds: Sequence[PromptKind]) -> _Evaluation:
        trainer = self._trainer()
        samples = [
            (self.templates[image % len(self.templates)], first_seed + image, class_index, kind)
            for kind in kinds
            for class_index, description in enumerate(self._descriptions())
            for image in range(images)
            if kind != "described" or description is not None
        ]
        return _part(samples, self.eval_batch_size, trainer.global_rank, trainer.world_size)

    def _descriptions(self) -> list[str | None]:
        return list(cast(Any, self._trainer().lightning_module).classes.values())

    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError(
                "PromptDataModule reads ranks and classes from its trainer; hand it to Trainer.fit or test"
            )
        return self.trainer


class PromptList(L.LightningDataModule):
    """Whole prompts to draw, each with every seed.

    Args:
        prompts: prompts, with placeholder tokens if wanted.
        seeds: seeds of the initial latents; the same as ``torch.Generator().manual_seed(seed)`` in diffusers.
        batch_size: images per step and device.

    Raises:
        UserError: for an empty list.
    """

    def __init__(self, prompts: list[str], seeds: list[int] = [0], batch_size: int = 8) -> None:  # noqa: B006 - as above
        super().__init__()
        if not prompts or not seeds:
            raise UserError(f"data.{'seeds' if prompts else 'prompts'} is empty; give at least one")
        self.prompts, self.seeds, self.batch_size = prompts, seeds, batch_size

    def predict_dataloader(self) -> _Evaluation:
        """All prompts with all seeds, this rank's part."""
        samples: list[tuple[str, int, int, PromptKind]] = [
            (prompt, seed, index, "token") for index, prompt in enumerate(self.prompts) for seed in self.seeds
        ]
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return _part(samples, self.batch_size, rank, world_size)
