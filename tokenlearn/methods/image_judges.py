"""What says, of a finished picture, how well it is what was asked for: models that guided nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from tokenlearn.errors import UserError
from tokenlearn.methods.image_guidance import ClipImageGuidance, ClipTextGuidance
from tokenlearn.metrics import is_classified_as
from tokenlearn.models import FrozenModule, TimmClassifier
from tokenlearn.models.aesthetic import AestheticHead


class ImageJudge(FrozenModule, ABC):
    """A figure of pictures.

    Attributes:
        figure: what the figure is, as the end of a column's name.
        pretrained: name or folder of the model that judges, which must be no guide.
    """

    figure: ClassVar[str]
    pretrained: str

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Figure (B,) of images (B, 3, H, W) in [0, 1], the larger the better."""


class ClassJudge(ImageJudge):
    """Whether a classifier sees all of what was asked for.

    Args:
        classifier: timm name or folder.
        labels: what pictures should show: one class, or several labels of a classifier of attributes.

    Raises:
        UserError: if there are no labels, or several of a classifier that gives one class.
    """

    figure = "accuracy"

    def __init__(self, classifier: str, labels: list[str]) -> None:
        super().__init__()
        if not labels:
            raise UserError("labels of ClassJudge is empty; name what pictures should show")
        self.classifier, self.pretrained = TimmClassifier(classifier), classifier
        self.classes = [self.classifier.label_index(label) for label in labels]
        if len(labels) > 1 and not self.classifier.multi_label:
            raise UserError(f"the judge '{classifier}' gives a picture one class, not {', '.join(labels)}; name one")

    def forward(self, images: Tensor) -> Tensor:
        """1 where all labels are seen, else 0."""
        logits: Tensor = self.classifier(images)
        targets = [torch.full((len(images),), index, device=images.device) for index in self.classes]
        seen = [is_classified_as(logits, target, self.classifier.multi_label) for target in targets]
        return torch.stack(seen).all(dim=0).float()


class _ClipJudge(ImageJudge):
    """How near pictures are to what a guidance of the same kind would take them to, by another CLIP."""

    figure = "clip_similarity"

    def __init__(self, guidance: ClipTextGuidance | ClipImageGuidance, clip: str) -> None:
        super().__init__()
        self.guidance, self.pretrained = guidance, clip

    def forward(self, images: Tensor) -> Tensor:
        """Cosine of pictures and target, in [-1, 1]."""
        return self.guidance.clip.image_features(images) @ self.guidance.target  # both of length 1


class ClipTextJudge(_ClipJudge):
    """How much pictures show what a text says, by a CLIP.

    Args:
        clip: hub id or folder.
        text: what pictures should show.
    """

    def __init__(self, clip: str, text: str) -> None:
        super().__init__(ClipTextGuidance(clip, text), clip)


class ClipImageJudge(_ClipJudge):
    """How much pictures show what other pictures show, by a CLIP.

    Args:
        clip: hub id or folder.
        images: picture files.
    """

    def __init__(self, clip: str, images: list[str]) -> None:
        super().__init__(ClipImageGuidance(clip, images), clip)


class AestheticJudge(ImageJudge):
    """The score of an aesthetic head.

    Args:
        head: folder, or file of a linear head.
        clip: hub id or folder of its CLIP; null for the one that the folder names.
    """

    figure = "aesthetic_score"

    def __init__(self, head: str, clip: str | None = None) -> None:
        super().__init__()
        self.head, self.pretrained = AestheticHead(head, clip), head

    def forward(self, images: Tensor) -> Tensor:
        """The score, on the scale of what the head was trained on."""
        score: Tensor = self.head(images)
        return score
