"""Typed batches: what data modules hand to tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

PromptKind = Literal["name", "word", "described", "start", "token"]
PROMPT_KINDS: tuple[PromptKind, ...] = ("name", "word", "described", "start", "token")


class PromptBatch(NamedTuple):
    """A batch of B images to generate, as prompts and seeds.

    Attributes:
        templates: B prompts with ``{}`` where the class goes, or whole prompts.
        seeds: B seeds of the initial latents.
        class_indices: B positions in the task's list of classes, or of whole prompts their positions in the list.
        kinds: B ways of writing the class: by its name, by its name after the best single word of the vocabulary, by
            its description, by its name after the words that its token started from, or with its token.
    """

    templates: list[str]
    seeds: list[int]
    class_indices: list[int]
    kinds: list[PromptKind]


class ImageBatch(NamedTuple):
    """A batch of B images in one of three forms: pixels, cached latents, or prompts and seeds to generate them from.

    Attributes:
        images: (B, 3, H, W) in [0, 1] at the size the backbone was trained for; None in the other two forms.
        latents: (B, C, h, w) scaled as the network expects them; None if they are not cached.
        labels: attribute name to (B,) int64 class indices, -1 where the class is not known.
        names: B file names or numbers.
        prompts: B prompts of generated images, else empty.
        seeds: B seeds of generated images, else empty.
    """

    images: Tensor | None
    latents: Tensor | None
    labels: dict[str, Tensor]
    names: list[str]
    prompts: Sequence[str] = ()
    seeds: Sequence[int] = ()
