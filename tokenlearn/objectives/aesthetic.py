"""Objective of pleasing images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenlearn.errors import UserError
from tokenlearn.losses.aesthetic import aesthetic_loss
from tokenlearn.losses.objective import Crops, Objective
from tokenlearn.models.aesthetic import AestheticHead
from tokenlearn.models.frozen import Precision


class AestheticLoss(Objective):
    """Score of an aesthetic head, to be raised or brought to a value.

    Args:
        head: folder, or file of a linear head (see :class:`tokenlearn.models.aesthetic.AestheticHead`); or a loaded
            head.
        clip: hub id or folder of the head's CLIP; null for the CLIP that the head's folder names.
        target: score to reach; null to raise the score without limit.
        weight: factor of the loss.
        crops: random crops to average the loss over; null for the whole image.
        dtype: precision of the head's CLIP, if it is given by name; the backbone's saves memory.

    Raises:
        UserError: if the head or its CLIP cannot be loaded, or the target is not finite.
    """

    score_kind = "score"
    score_name = "aesthetic_score"

    def __init__(
        self,
        head: str | AestheticHead,
        clip: str | None = None,
        target: float | None = None,
        *,
        weight: float = 1.0,
        crops: Crops | None = None,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__(weight, crops)
        if target is not None and not math.isfinite(target):
            raise UserError(f"target of AestheticLoss must be a finite number, got {target}")
        self.head = AestheticHead(head, clip, dtype) if isinstance(head, str) else head
        self.pretrained, self.target = self.head.pretrained, target

    def loss(self, images: Tensor, targets: Sequence[str] | None = None) -> Tensor:
        """Minus the score (B,), or its distance from the target score; ``targets`` are ignored."""
        return aesthetic_loss(self.head(images), self.target)

    def score(self, images: Tensor, targets: Sequence[str] | None = None) -> Tensor:
        """Score (B,) on the scale of the ratings that the head was trained on; ``targets`` are ignored."""
        scores: Tensor = self.head(images)
        return scores

    def loss_and_score(
        self, images: Tensor, targets: Sequence[str] | None = None, step: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Loss and score (B,) from one evaluation of the head, unless the loss is over crops."""
        if self.crops is not None:
            return super().loss_and_score(images, targets, step)
        scores: Tensor = self.head(images)
        return self.weight * aesthetic_loss(scores, self.target), torch.detach(scores)
