"""Parts of the tasks that edit images: the images, and the order in which processes take them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import lightning as L

from tokenlearn.data.images_to_edit import EditableImage, EditableImages, FolderImages, GeneratedImages
from tokenlearn.data.sources import Item, Skipped, items_below
from tokenlearn.data.streams import EvaluationBatches
from tokenlearn.errors import UserError, check_seeds
from tokenlearn.generation.results import ResultPlan, ResultStore
from tokenlearn.models import DiffusionBackbone
from tokenlearn.pipeline import Sampling

ImageBatches = EvaluationBatches[EditableImage | str, list[EditableImage | str]]

_READERS = 2


def images_to_edit(
    images: str | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    backbone: DiffusionBackbone,
    sampling: Sampling,
) -> EditableImages:
    """The images of a folder or a file, or without these generated images.

    Args:
        images: folder of images of any size, in any depth, or one image.
        prompts: images to generate: each prompt with each seed. They are ignored beside ``images``.
        seeds: seeds of generated images.
        backbone: model that takes the images.
        sampling: settings of the sampler, for the size of generated images and the shorter side of others.

    Raises:
        UserError: if there are no images, or a seed is out of range.
    """
    side = backbone.latent_size * backbone.vae_scale_factor
    if images is not None:
        return FolderImages(images, min(sampling.size or (side,)), backbone.vae_scale_factor)
    if not prompts:
        raise UserError("set model.images, to an image or a folder of images, or model.prompts, to generate images")
    check_seeds("model.seeds", seeds)
    height, width = sampling.size or (side, side)
    return GeneratedImages(prompts, seeds, (width, height))


def batches_to_edit(
    images: EditableImages, plan: ResultPlan, trainer: L.Trainer, *, batch_size: int = 1
) -> ImageBatches:
    """This rank's images in batches; of images whose results a callback of the trainer has stored, the name alone.

    An image that cannot be read does not stop the others: its name takes its place, and a warning at the end counts
    such images.

    Args:
        images: images of all ranks.
        plan: results of each image.
        trainer: trainer with rank and callbacks.
        batch_size: images in a batch.
    """
    callbacks: Sequence[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    stores = [callback for callback in callbacks if isinstance(callback, ResultStore)]
    indices = {name: index for index, name in enumerate(images.names)}
    broken: set[str] = set()

    # Finished images and those that cannot be read count too, by their names: a process that had no image left would
    # not meet the others at the end.
    def load(item: Item) -> EditableImage | str | Skipped:
        name = images.names[item.index]
        if any(store.is_done(plan, name) for store in stores):
            return name
        try:
            return images[item.index]
        except UserError as error:
            broken.add(name)
            return Skipped(name, str(error))

    def collate(samples: Sequence[EditableImage | str]) -> list[EditableImage | str]:
        """A batch, whole if any of it is to be made: part of one would be computed with other roundings."""
        if batch_size == 1 or not any(isinstance(sample, EditableImage) for sample in samples):
            return list(samples)
        return [
            images[indices[sample]] if isinstance(sample, str) and sample not in broken else sample
            for sample in samples
        ]

    count = len(images.names)
    return EvaluationBatches(
        partial(items_below, count),
        count,
        load,
        collate,
        batch_size=batch_size,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        num_workers=_READERS,
        in_place_of=lambda skipped: skipped.name,
    )


def unfinished(batch: Sequence[EditableImage | str]) -> list[EditableImage]:
    """The images of a batch that are not done."""
    return [image for image in batch if isinstance(image, EditableImage)]
