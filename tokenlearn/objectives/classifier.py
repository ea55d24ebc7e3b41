"""Objective of images of a class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenlearn.errors import UserError
from tokenlearn.losses.class_cross_entropy import class_cross_entropy
from tokenlearn.losses.classified_as import is_classified_as
from tokenlearn.losses.objective import Crops, Objective
from tokenlearn.models.classifier import TimmClassifier
from tokenlearn.models.frozen import Precision


class ClassifierLoss(Objective):
    """Cross-entropy of a classifier; the score is its accuracy.

    Class tokens (https://arxiv.org/abs/2303.17155) and DOODL (https://arxiv.org/abs/2303.13703) minimise it.

    Args:
        classifier: timm name or folder, or a :class:`TimmClassifier` with its settings, such as that of a file of
            weights.
        labels: class that images should show, by name or index, or several labels of a multi-label classifier, which
            images should show together; null for the targets, one class name per image. With labels, targets are
            ignored.
        weight: factor of the loss.
        crops: random crops to average the loss over; null for the whole image.
        dtype: precision of the classifier, if it is given by name; the backbone's saves memory.

    Attributes:
        classifier: the classifier.
        labels: as given, a tuple; None for the targets.

    Raises:
        UserError: if the classifier cannot be loaded or lacks a label, the list of labels is empty, or it names
            several labels of a classifier that assigns one class.
    """

    score_kind = "share"
    score_name = "accuracy"

    def __init__(
        self,
        classifier: str | TimmClassifier,
        labels: str | int | list[str | int] | None = None,
        *,
        weight: float = 1.0,
        crops: Crops | None = None,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__(weight, crops)
        self.classifier = TimmClassifier(classifier, dtype) if isinstance(classifier, str) else classifier
        self.pretrained = self.classifier.pretrained
        self.labels = None if labels is None else (labels,) if isinstance(labels, str | int) else tuple(labels)
        self.uses_targets = self.labels is None
        if self.labels is None:
            return
        if not self.labels:
            raise UserError("labels of ClassifierLoss is empty; name the class that images should show")
        self._label_indices = [self.classifier.label_index(label) for label in self.labels]
        if len(self.labels) > 1 and not self.classifier.multi_label:
            listed = ", ".join(map(str, self.labels))
            raise UserError(
                f"classifier '{self.pretrained}' assigns one class to an image, got labels {listed}; name one label"
            )

    def loss(self, images: Tensor, targets: Sequence[str] | None = None) -> Tensor:
        """Negative log-probability (B,) of the class, or of all labels together."""
        return self._loss(self.classifier(images), targets)

    def score(self, images: Tensor, targets: Sequence[str] | None = None) -> Tensor:
        """1 where the classifier sees the class, or all labels; else 0. (B,) float32."""
        return self._score(self.classifier(images), targets)

    def confidence(self, images: Tensor, targets: Sequence[str] | None = None) -> Tensor:
        """Probability (B,) of the class; of several labels, the lowest."""
        logits: Tensor = self.classifier(images)
        shares = logits.sigmoid() if self.classifier.multi_label else logits.softmax(dim=1)
        columns = [shares.gather(1, indices[:, None])[:, 0] for indices in self._target_indices(logits, targets)]
        return torch.stack(columns).amin(dim=0)

    def loss_and_score(
        self, images: Tensor, targets: Sequence[str] | None = None, step: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Loss and score (B,) from one evaluation of the classifier, unless the loss is over crops."""
        if self.crops is not None:
            return super().loss_and_score(images, targets, step)
        logits: Tensor = self.classifier(images)
        return self.weight * self._loss(logits, targets), self._score(logits.detach(), targets)

    def losses(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Losses (B, K) towards each of K classes, from one evaluation of the classifier."""
        if not self.uses_targets:
            return super().losses(images, names)
        logits: Tensor = self.classifier(images)
        indices = torch.tensor([self.classifier.label_index(name) for name in names], device=logits.device)
        rows = logits.repeat_interleave(len(indices), dim=0)
        losses = class_cross_entropy(rows, indices.repeat(len(logits)), self.classifier.multi_label)
        return losses.reshape(len(logits), -1)

    def check(self, targets: Sequence[str] | None = None) -> None:
        """Refuse unknown class names.

        Raises:
            UserError: if the classifier lacks a target, or there are neither labels nor targets.
        """
        if not self.uses_targets:
            return
        if targets is None:
            raise UserError(
                f"the classifier '{self.pretrained}' has no class to look for; set labels of ClassifierLoss"
            )
        for name in targets:
            self.classifier.label_index(name)

    def _loss(self, logits: Tensor, targets: Sequence[str] | None) -> Tensor:
        first, *others = (
            class_cross_entropy(logits, indices, self.classifier.multi_label)
            for indices in self._target_indices(logits, targets)
        )
        return sum(others, first)

    def _score(self, logits: Tensor, targets: Sequence[str] | None) -> Tensor:
        seen = [
            is_classified_as(logits, indices, self.classifier.multi_label)
            for indices in self._target_indices(logits, targets)
        ]
        return torch.stack(seen).all(dim=0).float()

    def _target_indices(self, logits: Tensor, targets: Sequence[str] | None) -> list[Tensor]:
        """Indices (B,) of each label, or of the targets."""
        if self.labels is not None:
            return [torch.full((len(logits),), index, device=logits.device) for index in self._label_indices]
        self.check(targets)
        assert targets is not None
        return [torch.tensor([self.classifier.label_index(name) for name in targets], device=logits.device)]
