"""Generated images by specification: a prompt and a seed, turned into latents by the task or read from a cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from tokenlearn.data.batches import ImageBatch
from tokenlearn.data.interfaces import ImageConsumer, LabelledImages, consumer_of, trainer_of
from tokenlearn.data.labels import UNKNOWN
from tokenlearn.data.latent_cache import LatentCache, LatentCaching, build_latents, in_full_batches
from tokenlearn.data.prompts import TEST_SEEDS, VALIDATION_SEEDS
from tokenlearn.data.sources import CountingSource, Item, ShuffledSource, items_below
from tokenlearn.data.streams import BatchStream, EvaluationBatches
from tokenlearn.errors import UserError, check_at_least


class GeneratedSample(NamedTuple):
    """One image of an :class:`tokenlearn.data.ImageBatch` that is to be generated.

    Attributes:
        prompt: prompt of the image.
        seed: seed of the initial latents.
        labels: attribute name to class index.
        latents: (C, h, w) if they are cached.
    """

    prompt: str
    seed: int
    labels: dict[str, int]
    latents: Tensor | None


def collate_generated(samples: Sequence[GeneratedSample]) -> ImageBatch:
    """A batch of samples that all have latents, or none."""
    latents = [sample.latents for sample in samples if sample.latents is not None]
    return ImageBatch(
        None,
        torch.stack(latents) if latents else None,
        {name: torch.tensor([sample.labels[name] for sample in samples]) for name in samples[0].labels},
        [f"seed{sample.seed}" for sample in samples],
        [sample.prompt for sample in samples],
        [sample.seed for sample in samples],
    )


class GeneratedDataModule(L.LightningDataModule, LabelledImages):
    """Generated images to learn from, made by the task on its device in each step, or once in advance.

    Image ``i`` has prompt ``i % len(prompts)`` and seed ``seed + i``. Validation and test have fixed seeds far away
    from the training's. All processes together see the batches that one process with the same global batch would see,
    and a resumed run continues with the next batch.

    Args:
        prompts: prompts, taken in turn.
        labels: prompt to its attributes and their class indices; other attributes are not known.
        num_images: number of images, read in passes in a different order each; null for new ones in every batch.
        batch_size: images per step and device.
        batches_per_epoch: steps per epoch and device; null for one pass, rounded up.
        eval_batch_size: images per step and device in validation and test; null for ``batch_size``, so that they fit
            where the training does.
        seed: seed of the first training image, 0 to 999999999, and of the orders of the passes.
        validation_images: images in each validation; 0 for none.
        test_images: images in the test; 0 for none.
        cache: where the latents of all these images are cached, made once when they are first needed; null to make
            them in each step.

    Raises:
        UserError: for an empty list of prompts, a number that is out of range, labels of an unknown prompt, or an
            epoch or a cache without an end.
    """

    def __init__(
        self,
        prompts: list[str],
        labels: dict[str, dict[str, int]] | None = None,
        *,
        num_images: int | None = None,
        batch_size: int = 8,
        batches_per_epoch: int | None = None,
        eval_batch_size: int | None = None,
        seed: int = 0,
        validation_images: int = 64,
        test_images: int = 64,
        cache: LatentCaching | None = None,
    ) -> None:
        super().__init__()
        if not prompts:
            raise UserError("data.prompts is empty; give at least one, such as 'a portrait of a woman'")
        check_at_least(
            "data",
            1,
            num_images=num_images,
            batch_size=batch_size,
            batches_per_epoch=batches_per_epoch,
            eval_batch_size=eval_batch_size,
        )
        check_at_least("data", 0, validation_images=validation_images, test_images=test_images)
        if not 0 <= seed < VALIDATION_SEEDS:
            raise UserError(f"data.seed must be from 0 to {VALIDATION_SEEDS - 1}, got {seed}")
        if unknown := sorted(set(labels or {}).difference(prompts)):
            raise UserError(f"data.labels has '{unknown[0]}', which is not among data.prompts; write both alike")
        if num_images is None and (cache is not None or batches_per_epoch is None):
            setting = "batches_per_epoch or num_images" if cache is None else "num_images, which a cache needs"
            raise UserError(f"new images are made without an end; set data.{setting}")
        self.prompts, self.labels, self.num_images = prompts, labels or {}, num_images
        self.attributes = sorted({attribute for classes in self.labels.values() for attribute in classes})
        self.batch_size, self.batches_per_epoch = batch_size, batches_per_epoch
        self.eval_batch_size = eval_batch_size or batch_size
        self.seed, self.validation_images, self.test_images = seed, validation_images, test_images
        self.cache = cache

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        """The attributes, whose classes have no names here."""
        return dict.fromkeys(self.attributes, ())

    def train_dataloader(self) -> BatchStream[GeneratedSample, ImageBatch]:
        """The training stream, this rank's part; makes the cache of latents first if there is to be one."""
        trainer = trainer_of(self)
        length, latents = self.batches_per_epoch, None
        if self.num_images is not None:
            length = length or -(-self.num_images // (self.batch_size * trainer.world_size))
            latents = self._cached_latents(trainer, self.seed, self.num_images, self.batch_size)
        assert length is not None
        return BatchStream(
            CountingSource() if self.num_images is None else ShuffledSource(self.num_images, self.seed),
            partial(self._sample, self.seed, latents),
            collate_generated,
            batch_size=self.batch_size,
            length=length,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def val_dataloader(self) -> EvaluationBatches[GeneratedSample, ImageBatch] | list[Any]:
        """Images for validation."""
        return self._evaluation(VALIDATION_SEEDS, self.validation_images) if self.validation_images else []

    def test_dataloader(self) -> EvaluationBatches[GeneratedSample, ImageBatch] | list[Any]:
        """Images for the test."""
        return self._evaluation(TEST_SEEDS, self.test_images) if self.test_images else []

    def _evaluation(self, first_seed: int, count: int) -> EvaluationBatches[GeneratedSample, ImageBatch]:
        trainer = trainer_of(self)
        latents = self._cached_latents(trainer, first_seed, count, self.eval_batch_size)
        return EvaluationBatches(
            partial(items_below, count),
            count,
            partial(self._sample, first_seed, latents),
            collate_generated,
            batch_size=self.eval_batch_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def _sample(self, first_seed: int, latents: LatentCache | None, item: Item) -> GeneratedSample:
        prompt = self.prompts[item.index % len(self.prompts)]
        labels = {name: self.labels.get(prompt, {}).get(name, UNKNOWN) for name in self.attributes}
        cached = None if latents is None else latents[item.index]
        return GeneratedSample(prompt, first_seed + item.index, labels, cached)

    def _cached_latents(self, trainer: L.Trainer, first_seed: int, count: int, batch_size: int) -> LatentCache | None:
        if self.cache is None:
            return None
        task = consumer_of(trainer, ImageConsumer)
        sampling = task.sampling_key()
        _require_constant([*self.prompts, json.dumps(sampling, default=str, ensure_ascii=False)], task)

        def generate(batch: Sequence[GeneratedSample]) -> Tensor:
            return task.generate_latents([sample.prompt for sample in batch], [sample.seed for sample in batch])

        def encode(items: Sequence[Item]) -> list[Tensor | None]:
            samples = (self._sample(first_seed, None, item) for item in items)
            return [*in_full_batches(generate, samples, batch_size)]

        key = {"sampling": sampling, "prompts": self.prompts, "seeds": [first_seed, count]}
        return build_latents(trainer, self.cache, key, items_below(count), encode, total=count)


def _require_constant(texts: Sequence[str], task: ImageConsumer) -> None:
    """Raise UserError if a prompt, or a prompt in the settings of the sampler, has a token that is being learned."""
    for text in texts:
        for placeholder in task.learned_placeholders:
            if placeholder.casefold() in text.casefold():
                raise UserError(
                    f"prompt '{text[:300]}' has the token '{placeholder}', whose images change as it is learned; set "
                    "data.cache to null"
                )
