"""Parts of the tasks that edit images: the images, and the order in which processes take them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import lightning as L

from tokenlearn.data.images_to_edit import EditableImage, EditableImages, FolderImages, GeneratedImages
from tokenlearn.data.sources import Item, Skipped, items_below
from tokenlearn.data.streams import EvaluationBatches
from tokenlearn.errors import UserError
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
        sampling: settings of the sampler, for the size of generated images.

    Raises:
        UserError: if there are no images.
    """
    side = backbone.latent_size * backbone.vae_scale_factor
    if images is not None:
        return FolderImages(images, side, backbone.vae_scale_factor)
    if not prompts:
        raise UserError("set model.images, to an image or a folder of images, or model.prompts, to generate images")
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

    # Finished images and those that cannot be read count too, by their names: a process that had no image left would
    # not meet the others at the end.
    def load(item: Item) -> EditableImage | str | Skipped:
        name = images.names[item.index]
        if any(store.is_done(plan, name) for store in stores):
            return name
        try:
            return images[item.index]
        except UserError as error:
            return Skipped(name, str(error))

    count = len(images.names)
    return EvaluationBatches(
        partial(items_below, count),
        count,
        load,
        list,
        batch_size=batch_size,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        num_workers=_READERS,
        in_place_of=lambda skipped: skipped.name,
    )


def unfinished(batch: Sequence[EditableImage | str]) -> list[EditableImage]:
    """The images of a batch that are not done."""
    return [image for image in batch if isinstance(image, EditableImage)]
