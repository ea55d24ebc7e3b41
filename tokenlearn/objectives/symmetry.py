"""Objective of symmetric images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenlearn.losses.objective import Objective
from tokenlearn.losses.symmetry import mirror_error


class SymmetryLoss(Objective):
    """Squared difference between an image and its left-right mirror image.

    It needs no model, so it shows whether an optimisation works at all.

    Args:
        weight: factor of the loss.
    """

    score_name = "symmetry"

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__(weight)

    def loss(self, images: Tensor, targets: Sequence[str] | None = None) -> Tensor:
        """Mean squared difference (B,); ``targets`` are ignored."""
        return mirror_error(images)
