"""Example images of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

from torch import Tensor

from tokenlearn.processes import of_all_processes


class ImageRows:
    """The first images of each caption, for :attr:`tokenlearn.evaluation.Table.images`.

    Args:
        length: most images of a caption.
    """

    def __init__(self, length: int = 8) -> None:
        self.length = length
        self._images: dict[str, list[Tensor]] = {}

    def add(self, caption: str, images: Tensor) -> None:
        """Add images (B, 3, H, W) in [0, 1] until the row is full."""
        row = self._images.setdefault(caption, [])
        row += list(images[: self.length - len(row)].float().cpu())

    def gather(self) -> None:
        """Take in the images of all processes, each of which has seen another part of the samples."""
        self._images = interleave(of_all_processes(self._images), self.length)

    def rows(self) -> list[tuple[str, list[Tensor]]]:
        """Captions with their images (3, H, W), in the order of their first image."""
        return [(caption, images) for caption, images in self._images.items() if images]


def interleave(parts: Sequence[Mapping[str, Sequence[Tensor]]], length: int) -> dict[str, list[Tensor]]:
    """The first images of each caption, by turns from each process, as samples are dealt out.

    Args:
        parts: caption to images (3, H, W) of each process.
        length: most images of a caption.
    """
    captions = dict.fromkeys(caption for part in parts for caption in part)
    merged = {}
    for caption in captions:
        turns = zip_longest(*(part.get(caption, ()) for part in parts))
        merged[caption] = [image for turn in turns for image in turn if image is not None][:length]
    return merged
