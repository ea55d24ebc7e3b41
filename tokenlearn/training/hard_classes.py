"""Classes of training images, more often those with a high loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenlearn.errors import UserError

_GOLDEN_RATIO = (5**0.5 - 1) / 2
_KEPT = 0.95  # share of a class's recent loss that stays when another image of it comes
_FIRST_IMAGES = 200  # of each class: until then all losses are high, and say little about which stay so


class HardClasses:
    """Recent losses of classes, and classes to learn next.

    Some tokens learn within a hundred steps and some take a thousand. A training that gives all of them the same
    number of images spends most of it on those that have learned already.

    Args:
        num_classes: number of classes.
        share: share of the images whose classes are drawn in proportion to the recent losses, from 0 to 1; the other
            images are shared out evenly. 0 leaves all batches as they are, as the first images of each class are.

    Attributes:
        losses: (num_classes,) float64 recent losses, moving averages over the images of a class; equal at first.
        images: (num_classes,) float64 numbers of images so far.

    Raises:
        UserError: if the share is out of range.
    """

    def __init__(self, num_classes: int, share: float) -> None:
        if not 0 <= share <= 1:
            raise UserError(f"model.hard_classes must be a share from 0 to 1, got {share:g}")
        self.share = share
        self.losses = torch.ones(num_classes, dtype=torch.float64)
        self.images = torch.zeros(num_classes, dtype=torch.float64)
        self._of_step = torch.zeros(2, num_classes, dtype=torch.float64)

    def frequencies(self) -> Tensor:
        """(num_classes,) share of the images of each class."""
        losses = self.losses.clamp(min=0)
        even = torch.full_like(losses, 1 / len(losses))
        return torch.lerp(even, losses / losses.sum(), self.share) if losses.sum() > 0 else even

    def assign(self, class_indices: Sequence[int], seeds: Sequence[int]) -> list[int]:
        """Class indices (B) of a batch in place of even ones, whatever batch an image is in.

        Args:
            class_indices: even ones.
            seeds: B seeds of the images.
        """
        if self.share == 0 or self.images.min() < _FIRST_IMAGES:
            return list(class_indices)
        return classes_of_seeds(self.frequencies(), seeds)

    def note(self, losses: Tensor, class_indices: Sequence[int]) -> None:
        """Add losses (B) to those of the current step of the optimizer."""
        indices = torch.tensor(class_indices)
        one_hot = F.one_hot(indices, len(self.losses)).double()
        self._of_step += torch.stack([losses.cpu().double() @ one_hot, one_hot.sum(dim=0)])

    def take_step(self) -> Tensor:
        """(2, num_classes) sums and numbers of the losses since the last time."""
        taken, self._of_step = self._of_step, torch.zeros_like(self._of_step)
        return taken

    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Take over the losses of a step.

        Args:
            sums: (num_classes,) summed losses of the images of each class, of all processes.
            counts: (num_classes,) their numbers.
        """
        kept = _KEPT**counts
        self.losses = kept * self.losses + (1 - kept) * sums / counts.clamp(min=1)
        self.images = self.images + counts

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint needs."""
        return {"losses": self.losses.tolist(), "images": self.images.tolist()}

    def restore(self, state: Mapping[str, list[float]]) -> None:
        """Take over the state of a checkpoint."""
        self.losses = torch.tensor(state["losses"], dtype=torch.float64)
        self.images = torch.tensor(state["images"], dtype=torch.float64)


def classes_of_seeds(frequencies: Tensor, seeds: Sequence[int]) -> list[int]:
    """Classes of images by their seeds.

    Multiples of the golden ratio place the images between 0 and 1, which the classes share. So any run of seeds has
    almost exactly as many images of each class as its share.

    Args:
        frequencies: (C,) shares of the classes, with sum 1.
        seeds: seeds of the images.
    """
    places = torch.tensor([seed * _GOLDEN_RATIO % 1 for seed in seeds], dtype=torch.float64)
    classes = torch.searchsorted(frequencies.cumsum(0), places, right=True).clamp(max=len(frequencies) - 1)
    chosen: list[int] = classes.tolist()
    return chosen
