"""Example images of an evaluation."""

from __future__ import annotations

from torch import Tensor


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

    def rows(self) -> list[tuple[str, list[Tensor]]]:
        """Captions with their images (3, H, W), in the order of their first image."""
        return [(caption, images) for caption, images in self._images.items() if images]
