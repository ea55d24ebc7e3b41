"""Objective of images of a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from tokenlearn.errors import UserError
from tokenlearn.losses.caso import class_mean_cosine
from tokenlearn.losses.class_cross_entropy import class_cross_entropy
from tokenlearn.losses.classified_as import is_classified_as
from tokenlearn.losses.objective import Crops, Objective
from tokenlearn.models.classifier import TimmClassifier
from tokenlearn.models.frozen import Precision

ClassLoss = Literal["cross_entropy", "class_mean"]
"""Forms of the loss towards a class."""


class ClassifierLoss(Objective):
    """Loss of a classifier towards a class; the score is its accuracy.

    Class tokens (https://arxiv.org/abs/2303.17155) and DOODL (https://arxiv.org/abs/2303.13703) minimise its
    cross-entropy. The form ``class_mean`` is the cosine distance of the penultimate features, which are not centred,
    from the class's row of the head: of a softmax, the row minus the mean row. In a collapsed classifier it points
    along the centred class mean (theorem 1 of CASO, https://arxiv.org/abs/2505.14254). This loss is in [0, 2], and its
    gradient does not vanish where the classifier is certain.

    Args:
        classifier: timm name or folder, or a :class:`TimmClassifier` with its settings, such as that of a file of
            weights.
        labels: class that images should show, by name or index, or several labels of a multi-label classifier, which
            images should show together; null for the targets, one class name per image. With labels, targets are
            ignored.
        form: ``cross_entropy`` or ``class_mean``, of several labels the sum.
        weight: factor of the loss.
        crops: random crops to average the loss over; null for the whole image.
        dtype: precision of the classifier, if it is given by name; the backbone's saves memory.

    Attributes:
        classifier: the classifier.
        labels: as given, a tuple; None for the targets.
        form: as given.

    Raises:
        UserError: if the classifier cannot be loaded or lacks a label, the list of labels is empty, or it names
            several labels of a classifier that assigns one class; for ``class_mean``, if its head is not linear; if
            there is no such form.
    """

    score_kind = "share"
    score_name = "accuracy"
    _directions: Tensor

    def __init__(
        self,
        classifier: str | TimmClassifier,
        labels: str | int | list[str | int] | None = None,
        *,
        form: ClassLoss = "cross_entropy",
        weight: float = 1.0,
        crops: Crops | None = None,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__(weight, crops)
        if form not in get_args(ClassLoss):
            raise UserError(f"form of ClassifierLoss must be one of {', '.join(get_args(ClassLoss))}, got '{form}'")
        self.form = form
        self.classifier = TimmClassifier(classifier, dtype) if isinstance(classifier, str) else classifier
        self.pretrained = self.classifier.pretrained
        self.labels = None if labels is None else (labels,) if isinstance(labels, str | int) else tuple(labels)
        self.uses_targets = self.labels is None
        if form == "class_mean":
            rows = self.classifier.head_weight
            # A softmax does not change by what is added to every row; a sigmoid does.
            directions = rows if self.classifier.multi_label else rows - rows.mean(dim=0)
            self.register_buffer("_directions", directions, persistent=False)
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
        """Loss (B,) towards the class: its negative log-probability, or one minus a cosine; of labels the sum."""
        return self._losses_and_logits(images, targets)[0]

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
        losses, logits = self._losses_and_logits(images, targets)
        return self.weight * losses, self._score(logits.detach(), targets)

    def losses(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Losses (B, K) towards each of K classes, from one evaluation of the classifier."""
        if not self.uses_targets:
            return super().losses(images, names)
        seen, _ = self._seen(images)
        indices = torch.tensor([self.classifier.label_index(name) for name in names], device=seen.device)
        losses = self._towards(seen.repeat_interleave(len(indices), dim=0), indices.repeat(len(seen)))
        return losses.reshape(len(seen), -1)

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

    def _losses_and_logits(self, images: Tensor, targets: Sequence[str] | None) -> tuple[Tensor, Tensor]:
        seen, logits = self._seen(images)
        first, *others = (self._towards(seen, indices) for indices in self._target_indices(logits, targets))
        return sum(others, first), logits

    def _seen(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the loss is of, logits or features, and the logits."""
        if self.form == "class_mean":
            features = self.classifier.features(images)
            return features, self.classifier.classify(features)
        logits: Tensor = self.classifier(images)
        return logits, logits

    def _towards(self, seen: Tensor, indices: Tensor) -> Tensor:
        """Losses (B,) of logits or features towards outputs of the classifier."""
        if self.form == "cross_entropy":
            return class_cross_entropy(seen, indices, self.classifier.multi_label)
        return class_mean_cosine(seen, indices, self._directions, seen.new_zeros(seen.shape[1]))

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
