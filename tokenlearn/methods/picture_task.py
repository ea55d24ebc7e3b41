"""What tasks that edit pictures share: the pictures, and the order in which processes take them."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from tokenlearn.data.pictures import FolderPictures, GeneratedPictures, Picture, Pictures
from tokenlearn.data.sharding import EvaluationBatches, Item, items_below
from tokenlearn.errors import UserError
from tokenlearn.methods.generate import Generate
from tokenlearn.models import DiffusionBackbone

_READ_AHEAD = 2


class Edited(NamedTuple):
    """A picture and its edits.

    Attributes:
        picture: the picture as it was read, or what it was generated from.
        before: (3, H, W) the picture in [0, 1] at the model's size.
        edits: (E, 3, H, W) in [0, 1], one per edit.
        strips: caption to (S, 3, H, W) in [0, 1], one per scale.
        guidance: name of an edit to the (T, C, h, w) guidance that made it, where it is recorded.
        latents: (..., C, h, w) optimised latents, of tasks that have them.
        history: a row for each step of their optimisation, all with the same columns.
    """

    picture: Picture
    before: Tensor
    edits: Tensor
    strips: Mapping[str, Tensor]
    guidance: Mapping[str, Tensor]
    latents: Tensor | None = None
    history: Sequence[Mapping[str, float]] = ()


def file_stem(text: str) -> str:
    """Words and tokens as part of a file's name: ``<no-smile>`` gives ``no-smile``."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-")


class PictureTask(Generate):
    """Make edits of given or generated pictures. The pictures are settings of the task, so it needs no data section.

    Args:
        backbone: frozen diffusion model.
        images: folder of pictures of any size, in any depth, or one picture.
        prompts: pictures to generate and to edit, instead of a folder: each prompt with each seed.
        seeds: seeds of generated pictures.
        embeddings: embedding files. A checkpoint's tokens take their place.
        num_inference_steps: sampling steps.
        guidance_scale: classifier-free guidance scale of generated pictures.
        scheduler: diffusers scheduler by class name; null for the pipeline's own.
        negative_prompt: prompt of the unconditional branch.
        pictures_at_once: pictures in a batch.

    Attributes:
        pictures: the pictures.
        captions: for people, one per edit.
        edit_names: for file names, one per edit.
        strip_scales: caption of each strip to its scales.
        sheet_name: file name of the sheet of the first pictures and their edits.
        first_caption: of the pictures that the edits are of.
        optimises_latents: whether every picture comes with optimised latents and their history.
        is_done: tells by its name whether a picture's edits are there already, so that it is left out.

    Raises:
        UserError: if there are no pictures, or both kinds.
    """

    captions: Sequence[str]
    edit_names: Sequence[str]
    strip_scales: Mapping[str, Sequence[float]]
    sheet_name = "before_after.png"
    first_caption = "before"
    optimises_latents = False

    def __init__(
        self,
        backbone: DiffusionBackbone,
        images: str | None,
        prompts: Sequence[str],
        seeds: Sequence[int],
        embeddings: list[str],
        num_inference_steps: int,
        guidance_scale: float,
        scheduler: str | None,
        negative_prompt: str,
        pictures_at_once: int = 1,
    ) -> None:
        super().__init__(backbone, embeddings, num_inference_steps, guidance_scale, scheduler, negative_prompt)
        side, factor = backbone.latent_size * backbone.vae_scale_factor, backbone.vae_scale_factor
        if (images is None) != bool(prompts):
            raise UserError("set either model.images, to a folder of pictures, or model.prompts, to generate some")
        self.pictures: Pictures = (
            GeneratedPictures(prompts, seeds, side) if images is None else FolderPictures(images, side, factor)
        )
        self.pictures_at_once = pictures_at_once
        self.is_done: Callable[[str], bool] = _never

    @abstractmethod
    def edit_pictures(self, pictures: Sequence[Picture]) -> list[Edited]:
        """Make all edits of pictures."""

    @staticmethod
    def strip_label(scale: float) -> str:
        """What stands above a picture of a strip."""
        return f"{scale:+g}" if scale else "0"

    def predict_dataloader(self) -> EvaluationBatches[Picture | str, list[Picture | str]]:
        """This rank's pictures; of those that are done the name alone."""

        # Those that are done count too: a process that had none left would not meet the others at the end.
        def load(item: Item) -> Picture | str:
            name = self.pictures.names[item.index]
            return name if self.is_done(name) else self.pictures[item.index]

        count = len(self.pictures.names)
        return EvaluationBatches(
            partial(items_below, count),
            count,
            load,
            list,
            batch_size=self.pictures_at_once,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            num_workers=_READ_AHEAD,
        )

    def predict_step(self, batch: list[Picture | str]) -> list[Edited]:  # type: ignore[override]
        """Edit those of the pictures that are not done."""
        return self.edit_pictures([picture for picture in batch if isinstance(picture, Picture)])


def _never(name: str) -> bool:
    return False
