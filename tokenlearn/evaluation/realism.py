"""How far generated images are from real ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenlearn.data.image_source import open_images
from tokenlearn.data.pixels import readable_squares, unit_range
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.models import TimmClassifier

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Realism:
    """Kernel distance of images to real images.

    Attributes:
        judge: timm name or folder of the classifier in whose features images are compared.
        reference: real images, see :func:`tokenlearn.data.image_source.open_images`.
        images: number of real images.

    Raises:
        UserError: if there are fewer than two real images.
    """

    judge: str
    reference: str
    images: int = 200

    def __post_init__(self) -> None:
        check_at_least("model.realism", 2, images=self.images)

    @torch.no_grad()
    def features(self, judge: TimmClassifier, size: int) -> Tensor:
        """Features (N, F) that the judge gives the real images, cut to squares of a size in pixels.

        Raises:
            UserError: if fewer than two can be used.
        """
        rows = (row["image"] for row in open_images(self.reference).open())
        pixels = readable_squares(rows, size, self.images, self.reference)
        if len(pixels) < 2:
            raise UserError(
                f"model.realism.reference '{self.reference}' has {len(pixels)} images that can be used; a distance "
                "needs at least 2"
            )
        device = next(judge.parameters()).device
        parts = (unit_range(pixels[first : first + _BATCH]) for first in range(0, len(pixels), _BATCH))
        return torch.cat([judge.features(part.to(device)) for part in parts])
