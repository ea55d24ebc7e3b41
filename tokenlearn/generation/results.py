"""Results of the tasks that make images, and the files of a run folder that hold them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tokenlearn.data.images_to_edit import EditableImage, EditableImages

BEFORE, STRIP, LATENTS, LOSSES = "before", "strip", "latents", "losses"


class GeneratedBatch(NamedTuple):
    """Generated images.

    Attributes:
        images: (B, 3, H, W) in [0, 1].
        prompts: B prompts.
        seeds: B seeds.
        indices: B positions in the list of prompts.
    """

    images: Tensor
    prompts: Sequence[str]
    seeds: Sequence[int]
    indices: Sequence[int]


class EditResult(NamedTuple):
    """An image and its edits.

    Attributes:
        image: the image as it was read, or the prompt and seed it was generated from.
        before: (3, H, W) in [0, 1], the image at the model's size.
        edits: (E, 3, H, W) in [0, 1], one for each edit.
        strips: caption to (S, 3, H, W) in [0, 1], one for each scale or step.
        guidance: name of an edit to its recorded guidance (T, C, h, w).
        latents: optimised latents (C, h, w) or (2, C, h, w).
        history: a row for each step of an optimisation, all with the same columns.
        unedited: (3, H, W) in [0, 1], the image inverted and denoised without an edit, if edits are pasted onto the
            original as differences from it.
    """

    image: EditableImage
    before: Tensor
    edits: Tensor
    strips: Mapping[str, Tensor] = {}
    guidance: Mapping[str, Tensor] = {}
    latents: Tensor | None = None
    history: Sequence[Mapping[str, float]] = ()
    unedited: Tensor | None = None


@dataclass(frozen=True)
class ResultPlan:
    """What a task makes of each image, and the files of it.

    Attributes:
        captions: name of each edit in files to its caption, in the order of the edits.
        strips: caption of each strip to the captions of its images.
        sheet: file of the sheet of the first images and their edits.
        first_caption: caption of the images themselves on the sheet.
        writes_before: whether the images themselves are written, because they are generated.
        writes_latents: whether every image comes with optimised latents and the history of their optimisation.
    """

    captions: Mapping[str, str]
    strips: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sheet: str = "before_after.png"
    first_caption: str = BEFORE
    writes_before: bool = False
    writes_latents: bool = False

    def files(self, name: str) -> dict[str, Path]:
        """Files of an image below the run folder, which are all there when it is done.

        Args:
            name: name of the image.

        Returns:
            Names of edits to their files, then :data:`BEFORE`, :data:`STRIP`, :data:`LATENTS` and :data:`LOSSES`.
        """
        edits = [*self.captions, *([BEFORE] if self.writes_before else [])]
        files = {edit: Path("images", edit, f"{name}.png") for edit in edits}
        if self.strips:
            files[STRIP] = Path("strips", f"{name}.png")
        if self.writes_latents:
            files[LATENTS] = Path("latents", f"{name}.safetensors")
            files[LOSSES] = Path("losses", f"{name}.csv")
        return files


class EditTask(ABC):
    """A task that makes an :class:`EditResult` of each of its images.

    Attributes:
        images: the images.
        plan: what it makes of each.
    """

    images: EditableImages
    plan: ResultPlan


class ResultStore(ABC):
    """A callback that stores results, and knows which are there already from an earlier, interrupted run."""

    @abstractmethod
    def is_done(self, plan: ResultPlan, name: str) -> bool:
        """Whether all results of an image are stored, so that the task leaves it out."""


class BatchStore(ABC):
    """A callback that stores generated images, and knows which are there already from an earlier, interrupted run."""

    @abstractmethod
    def is_batch_done(self, prompts: Sequence[str], seeds: Sequence[int], indices: Sequence[int]) -> bool:
        """Whether all images of a batch are stored, so that the task leaves it out.

        Args:
            prompts: B prompts.
            seeds: B seeds.
            indices: B positions in the list of prompts.
        """


def file_stem(text: str) -> str:
    """Words and tokens as part of a file's name: ``<no-smile>`` gives ``no-smile``."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")
