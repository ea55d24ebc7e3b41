"""Objectives: a loss and a score of finished images."""

from __future__ import annotations

import copy
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenlearn.errors import UserError, check_at_least

ScoreKind = Literal["share", "score", "similarity"]
"""Unit of a score: 0 or 1 per image, so that means are shares; a free scale; or a cosine in [-1, 1]."""


@dataclass(frozen=True)
class Crops:
    """Random crops of an image, over which an objective averages its loss.

    The released code of DOODL (https://arxiv.org/abs/2303.13703) uses only the crop with the lowest CLIP loss, which
    improves one crop and leaves the rest of the image alone.

    Args:
        number: crops per image, at least 1.
        smallest: smallest side of a crop as a share of the image's side, in (0, 1]; shares are uniform from it to 1.
        seed: seed of the crops. A crop depends on the seed and the step only, so every image of a batch and every
            resumed run gets the same crops.
        checkpointing: evaluate each crop again in the backward pass: the memory of one crop, not of all, for about a
            third more time.

    Raises:
        UserError: if a number is out of range.
    """

    number: int
    smallest: float = 0.3
    seed: int = 0
    checkpointing: bool = True

    def __post_init__(self) -> None:
        check_at_least("crops", 1, number=self.number)
        check_at_least("crops", 0, seed=self.seed)
        if not 0 < self.smallest <= 1:
            raise UserError(f"crops.smallest must be above 0 and at most 1, got {self.smallest}")

    def __call__(self, images: Tensor, step: int) -> list[Tensor]:
        """Crops (B, C, h, w) of images (B, C, H, W) at a step."""
        return random_crops(images, self.number, self.smallest, random.Random(f"{self.seed} {step}"))


def random_crops(images: Tensor, number: int, smallest: float, generator: random.Random) -> list[Tensor]:
    """Crops of images, at the same place in each image of the batch and with the image's aspect ratio.

    Args:
        images: (B, C, H, W).
        number: number of crops.
        smallest: smallest side of a crop as a share of the image's side; shares are uniform from it to 1.
        generator: source of randomness.

    Returns:
        ``number`` tensors (B, C, h, w).
    """
    height, width = images.shape[-2:]
    crops = []
    for _ in range(number):
        share = generator.uniform(smallest, 1)
        crop_height, crop_width = max(1, round(share * height)), max(1, round(share * width))
        top, left = generator.randint(0, height - crop_height), generator.randint(0, width - crop_width)
        crops.append(images[..., top : top + crop_height, left : left + crop_width])
    return crops


class Objective(nn.Module, ABC):
    """A differentiable loss of images and a score that reports how well they meet it.

    A subclass implements :meth:`loss`, and :meth:`score` where it is more than minus the loss. Objectives add up and
    scale: ``ClassifierLoss("guide", "pirate") + 8 * CLIPTextLoss("clip", "a pirate")``. They are frozen and stay in
    eval mode.

    Args:
        weight: factor of the loss.
        crops: random crops to average the loss over; None for the whole image.

    Attributes:
        pretrained: name or folder of the objective's model, None without one.
        score_kind: unit of the score.
        score_name: name of the score in tables.
        uses_targets: whether the objective depends on ``targets``; if not, it ignores them.
        has_score: whether :meth:`score` can be called.

    Raises:
        UserError: if the weight is not finite.
    """

    pretrained: str | None = None
    score_kind: ScoreKind = "score"
    score_name: str = "score"
    uses_targets: bool = False
    has_score: bool = True

    def __init__(self, weight: float = 1.0, crops: Crops | None = None) -> None:
        super().__init__()
        self.weight, self.crops = self._finite(weight), crops

    def forward(self, images: Tensor, step: int = 0, targets: Sequence[str] | None = None) -> Tensor:
        """Weighted loss, averaged over crops: what an optimiser minimises.

        Args:
            images: (B, 3, H, W), nominally in [0, 1].
            step: selects the crops.
            targets: B targets, such as class names.

        Returns:
            (B,) losses times the weight, differentiable in the images.

        Raises:
            UserError: see :meth:`check`.
        """
        if self.crops is None:
            return self.weight * self.loss(images, targets)
        crops = self.crops(images, step)
        if self.crops.checkpointing and len(crops) > 1 and images.requires_grad and torch.is_grad_enabled():
            losses = [
                checkpoint(self.loss, crop, targets, use_reentrant=False, preserve_rng_state=False) for crop in crops
            ]
        else:
            losses = [self.loss(crop, targets) for crop in crops]
        return self.weight * torch.stack(losses).mean(dim=0)

    @abstractmethod
    def loss(self, images: Tensor, targets: Sequence[str] | None = None) -> Tensor:
        """Loss without weight and crops.

        Args:
            images: (B, 3, H, W), nominally in [0, 1].
            targets: B targets.

        Returns:
            (B,) losses, differentiable in the images.
        """

    def score(self, images: Tensor, targets: Sequence[str] | None = None) -> Tensor:
        """How well images meet the objective; minus the loss unless a subclass has a better score.

        Args:
            images: (B, 3, H, W) in [0, 1].
            targets: B targets.

        Returns:
            (B,) scores of ``score_kind``, larger is better.
        """
        return -self.loss(images, targets)

    def confidence(self, images: Tensor, targets: Sequence[str] | None = None) -> Tensor:
        """The score, or a continuous form of a score that is 0 or 1 (a classifier's probability); for curves.

        Args:
            images: (B, 3, H, W) in [0, 1].
            targets: B targets.

        Returns:
            (B,), larger is better.
        """
        return self.score(images, targets)

    def loss_and_score(
        self, images: Tensor, targets: Sequence[str] | None = None, step: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Loss as :meth:`forward` returns it, and score of the same images.

        Without crops, objectives with a network evaluate it once for both.

        Args:
            images: (B, 3, H, W), nominally in [0, 1].
            targets: B targets.
            step: selects the crops.

        Returns:
            (B,) weighted losses, differentiable in the images; (B,) scores without a graph.
        """
        losses = self(images, step, targets)
        with torch.no_grad():
            return losses, self.score(images.detach(), targets)

    def losses(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Losses of each image towards each of K targets, without weight and crops.

        Args:
            images: (B, 3, H, W), nominally in [0, 1].
            names: K targets.

        Returns:
            (B, K) losses, differentiable in the images.
        """
        if not self.uses_targets:
            return self.loss(images)[:, None].expand(-1, len(names))
        return torch.stack([self.loss(images, [name] * len(images)) for name in names], dim=1)

    def check(self, targets: Sequence[str] | None = None) -> None:
        """Refuse targets that the objective does not know. Call it before a long computation.

        Raises:
            UserError: if a target is unknown, or there are no targets although the objective depends on them.
        """
        if self.uses_targets and targets is None:
            raise UserError(f"{type(self).__name__} has no target here; name the target in its settings")

    def texts(self, target: str | None = None) -> Iterator[str]:
        """Texts that say in words what the objective asks of an image; none unless it is made of words.

        Args:
            target: of the image.
        """
        yield from ()

    def models(self) -> Iterator[str]:
        """Names or folders of the models in the objective, for the check that a judge is another model."""
        if self.pretrained is not None:
            yield self.pretrained

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode whatever ``mode`` says."""
        return super().train(False)

    def __add__(self, other: Objective) -> ObjectiveSum:
        if not isinstance(other, Objective):
            return NotImplemented
        return ObjectiveSum([self, other])

    def __mul__(self, factor: float) -> Objective:
        """The objective with its weight times ``factor``; both share one model."""
        if not isinstance(factor, int | float):
            return NotImplemented
        scaled = copy.copy(self)
        scaled.weight = self._finite(factor * self.weight)
        return scaled

    def __rmul__(self, factor: float) -> Objective:
        return self * factor

    def _finite(self, weight: float) -> float:
        if not math.isfinite(weight):
            raise UserError(f"weight of {type(self).__name__} must be a finite number, got {weight}")
        return weight


class ObjectiveSum(Objective):
    """Weighted sum of objectives; ``a + 8 * b`` makes one.

    The weights are those of the terms, and each term has its crops.

    Args:
        terms: at least one objective; the terms of a sum take its place.

    Attributes:
        terms: the objectives.

    Raises:
        UserError: if there are no terms.
    """

    def __init__(self, terms: Sequence[Objective]) -> None:
        super().__init__()
        flat = [part for term in terms for part in (term if isinstance(term, ObjectiveSum) else [term])]
        if not flat:
            raise UserError("the list of objectives is empty; give at least one, such as ClassifierLoss")
        self.terms = nn.ModuleList(flat)
        self.uses_targets = any(term.uses_targets for term in flat)
        kinds, names = ({getattr(term, name) for term in flat} for name in ("score_kind", "score_name"))
        self.has_score = len(kinds) == 1 and all(term.has_score for term in flat)
        if self.has_score:
            self.score_kind = flat[0].score_kind
        if len(names) == 1:
            self.score_name = flat[0].score_name

    def __iter__(self) -> Iterator[Objective]:
        return cast(Iterator[Objective], iter(self.terms))

    def forward(self, images: Tensor, step: int = 0, targets: Sequence[str] | None = None) -> Tensor:
        """Sum of the terms' weighted losses (B,), see :meth:`Objective.forward`."""
        losses: Tensor = sum(term(images, step, targets) for term in self)
        return losses

    def loss(self, images: Tensor, targets: Sequence[str] | None = None) -> Tensor:
        """Sum of the terms' weighted losses (B,) of whole images."""
        return cast(Tensor, sum(term.weight * term.loss(images, targets) for term in self))

    def score(self, images: Tensor, targets: Sequence[str] | None = None) -> Tensor:
        """Weighted mean (B,) of the terms' scores.

        Raises:
            UserError: if the terms' scores have different units, or the weights add up to zero.
        """
        return self._mean_score([term.score(images, targets) for term in self._comparable()])

    def confidence(self, images: Tensor, targets: Sequence[str] | None = None) -> Tensor:
        """Weighted mean (B,) of the terms' confidences; errors as in :meth:`score`."""
        return self._mean_score([term.confidence(images, targets) for term in self._comparable()])

    def loss_and_score(
        self, images: Tensor, targets: Sequence[str] | None = None, step: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Sum of the terms' losses and weighted mean of their scores; each term evaluates its network once."""
        losses, scores = zip(*(term.loss_and_score(images, targets, step) for term in self._comparable()), strict=True)
        return cast(Tensor, sum(losses)), self._mean_score(scores)

    def losses(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Sum of the terms' weighted losses (B, K) of each image towards each of K targets."""
        return cast(Tensor, sum(term.weight * term.losses(images, names) for term in self))

    def check(self, targets: Sequence[str] | None = None) -> None:
        """Refuse targets that a term does not know, see :meth:`Objective.check`."""
        for term in self:
            term.check(targets)

    def texts(self, target: str | None = None) -> Iterator[str]:
        """Texts of the terms, see :meth:`Objective.texts`."""
        for term in self:
            yield from term.texts(target)

    def models(self) -> Iterator[str]:
        """Names or folders of the terms' models."""
        for term in self:
            yield from term.models()

    def __mul__(self, factor: float) -> Objective:
        """The sum with every term's weight times ``factor``."""
        if not isinstance(factor, int | float):
            return NotImplemented
        return ObjectiveSum([term * factor for term in self])

    def _comparable(self) -> ObjectiveSum:
        """The sum itself, if its terms' scores can be averaged."""
        if not self.has_score:
            kinds = ", ".join(f"{type(term).__name__} a {term.score_kind}" for term in self)
            raise UserError(f"the terms of the objective have scores of different kinds ({kinds}); choose a judge")
        return self

    def _mean_score(self, scores: Sequence[Tensor]) -> Tensor:
        total = sum(term.weight for term in self)
        if not total:
            raise UserError("the weights of the objective add up to 0, so its score has no mean; choose a judge")
        weighted = sum(term.weight * score for term, score in zip(self, scores, strict=True))
        return cast(Tensor, weighted) / total


def as_objective(objective: Objective | Sequence[Objective]) -> Objective:
    """One objective from a setting that is an objective or a list of objectives, whose sum counts.

    Raises:
        UserError: if the list is empty.
    """
    return objective if isinstance(objective, Objective) else ObjectiveSum(objective)
