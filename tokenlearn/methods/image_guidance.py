"""What a finished picture should be like: losses with the frozen models that they need, to be listed in a config."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tokenlearn.data.images import to_rgb, unit_range
from tokenlearn.errors import UserError, check_at_least, reason_of
from tokenlearn.losses import aesthetic_loss, class_cross_entropy, mean_direction, mirror_error, spherical_distance
from tokenlearn.methods.learning import is_same_model
from tokenlearn.models import FrozenModule, TimmClassifier
from tokenlearn.models.aesthetic import AestheticHead
from tokenlearn.models.clip import ClipModel


class ImageGuidance(FrozenModule, ABC):
    """A loss of pictures.

    Args:
        weight: factor of the loss in a sum of several.
        crops: number of random crops whose mean loss counts; 0 for the whole picture. The released code of DOODL
            (https://arxiv.org/abs/2303.13703) takes the crop with the least loss for CLIP, so that one crop alone is
            improved.
        smallest_crop: share of the sides that a crop has at least, in (0, 1].
        crop_seed: seed of the crops. They depend on it and on the step alone, so that pictures in one batch, and a run
            that is taken up again, get the same.

    Raises:
        UserError: if a number is out of range.

    Attributes:
        pretrained: name or folder of the model that guides, None without one.
    """

    pretrained: str | None = None

    def __init__(self, weight: float = 1.0, crops: int = 0, smallest_crop: float = 0.3, crop_seed: int = 0) -> None:
        super().__init__()
        if not math.isfinite(weight):
            raise UserError(f"weight of {type(self).__name__} must be a finite number, got {weight}")
        check_at_least(type(self).__name__, 0, crops=crops)
        if not 0 < smallest_crop <= 1:
            raise UserError(f"smallest_crop must be above 0 and at most 1, got {smallest_crop}")
        self.weight, self.crops, self.smallest_crop, self.crop_seed = weight, crops, smallest_crop, crop_seed

    def forward(self, images: Tensor, step: int = 0) -> Tensor:
        """The weighted loss.

        Args:
            images: (B, 3, H, W), nominally in [0, 1].
            step: names the crops.

        Returns:
            (B,) losses times the weight, differentiable in the pictures.
        """
        if not self.crops:
            return self.weight * self.loss(images)
        generator = random.Random(f"{self.crop_seed} {step}")
        views = random_crops(images, self.crops, self.smallest_crop, generator)
        return self.weight * torch.stack([self.loss(view) for view in views]).mean(dim=0)

    @abstractmethod
    def loss(self, images: Tensor) -> Tensor:
        """Loss (B,) of pictures (B, 3, H, W), nominally in [0, 1]."""


def is_guide(model: str, guidances: Iterable[ImageGuidance]) -> bool:
    """Whether a model, by its name or folder, is that of one of the guidances."""
    return any(own.pretrained is not None and is_same_model(own.pretrained, model) for own in guidances)


def random_crops(images: Tensor, number: int, smallest: float, generator: random.Random) -> list[Tensor]:
    """Parts of pictures (B, C, H, W), the same of all, with their proportions.

    Args:
        images: pictures.
        number: how many.
        smallest: share of the sides that a part has at least; shares are uniform from it to 1.
        generator: source of randomness.

    Returns:
        ``number`` tensors (B, C, h, w).
    """
    height, width = images.shape[-2:]
    views = []
    for _ in range(number):
        share = generator.uniform(smallest, 1)
        own_height, own_width = max(1, round(share * height)), max(1, round(share * width))
        top, left = generator.randint(0, height - own_height), generator.randint(0, width - own_width)
        views.append(images[..., top : top + own_height, left : left + own_width])
    return views


class ClassGuidance(ImageGuidance):
    """Pictures of a class: the cross-entropy of a classifier, DOODL's guidance towards rare and fine-grained words.

    Args:
        classifier: timm name or folder.
        label: name of the class.
        weight, crops, smallest_crop, crop_seed: see :class:`ImageGuidance`.

    Raises:
        UserError: if the classifier cannot be loaded or has no such class.
    """

    def __init__(
        self,
        classifier: str,
        label: str,
        weight: float = 1.0,
        crops: int = 0,
        smallest_crop: float = 0.3,
        crop_seed: int = 0,
    ) -> None:
        super().__init__(weight, crops, smallest_crop, crop_seed)
        self.classifier, self.pretrained = TimmClassifier(classifier), classifier
        self.label = self.classifier.label_index(label)

    def loss(self, images: Tensor) -> Tensor:
        """Negative log-probability of the class."""
        targets = torch.full((len(images),), self.label, device=images.device)
        return class_cross_entropy(self.classifier(images), targets, self.classifier.multi_label)


class _ClipGuidance(ImageGuidance):
    """Pictures near a direction of CLIP's space."""

    target: Tensor

    def __init__(self, clip: str, weight: float, crops: int, smallest_crop: float, crop_seed: int) -> None:
        super().__init__(weight, crops, smallest_crop, crop_seed)
        self.clip, self.pretrained = ClipModel(clip), clip

    def loss(self, images: Tensor) -> Tensor:
        """Half of the squared angle to the target."""
        return spherical_distance(self.clip.image_features(images), self.target)


class ClipTextGuidance(_ClipGuidance):
    """Pictures that show what a text says, by a CLIP.

    Args:
        clip: hub id or folder.
        text: what to show.
        weight, crops, smallest_crop, crop_seed: see :class:`ImageGuidance`.

    Raises:
        UserError: if there is no text, or the CLIP cannot be loaded.
    """

    def __init__(
        self,
        clip: str,
        text: str,
        weight: float = 1.0,
        crops: int = 0,
        smallest_crop: float = 0.3,
        crop_seed: int = 0,
    ) -> None:
        if not text.strip():
            raise UserError("text of ClipTextGuidance is empty; say what pictures should show")
        super().__init__(clip, weight, crops, smallest_crop, crop_seed)
        with torch.no_grad():
            self.register_buffer("target", self.clip.text_features([text])[0], persistent=False)


class ClipImageGuidance(_ClipGuidance):
    """Pictures that show what other pictures show, by a CLIP: DOODL's personalisation.

    Args:
        clip: hub id or folder.
        images: picture files; of several, the mean direction is the target.
        weight, crops, smallest_crop, crop_seed: see :class:`ImageGuidance`.

    Raises:
        UserError: if there are no files or one cannot be read, or the CLIP cannot be loaded.
    """

    def __init__(
        self,
        clip: str,
        images: list[str],
        weight: float = 1.0,
        crops: int = 0,
        smallest_crop: float = 0.3,
        crop_seed: int = 0,
    ) -> None:
        if not images:
            raise UserError("images of ClipImageGuidance is empty; give at least one picture file")
        pictures = _read(images)
        super().__init__(clip, weight, crops, smallest_crop, crop_seed)
        with torch.no_grad():
            features = torch.cat([self.clip.image_features(picture) for picture in pictures])
            self.register_buffer("target", mean_direction(features), persistent=False)


def _read(files: Sequence[str]) -> list[Tensor]:
    """Pictures (1, 3, H, W) in [0, 1], each of its own size, upright."""
    pictures = []
    for file in files:
        try:
            with Image.open(Path(file).expanduser()) as opened:
                image = to_rgb(ImageOps.exif_transpose(opened))
        except Exception as error:  # decoders raise all sorts
            raise UserError(
                f"cannot read picture '{file}' of ClipImageGuidance ({reason_of(error)}); name another file"
            ) from error
        pictures.append(unit_range([torch.from_numpy(np.array(image))]))
    return pictures


class AestheticGuidance(ImageGuidance):
    """Pictures that please an aesthetic head.

    Args:
        head: folder, or file of a linear head, see :class:`tokenlearn.models.aesthetic.AestheticHead`.
        clip: hub id or folder of its CLIP; null for the one that the folder names.
        target: score to reach; null to raise the score without end.
        weight, crops, smallest_crop, crop_seed: see :class:`ImageGuidance`.

    Raises:
        UserError: if the head or its CLIP cannot be loaded, or the target is no number.
    """

    def __init__(
        self,
        head: str,
        clip: str | None = None,
        target: float | None = None,
        weight: float = 1.0,
        crops: int = 0,
        smallest_crop: float = 0.3,
        crop_seed: int = 0,
    ) -> None:
        super().__init__(weight, crops, smallest_crop, crop_seed)
        if target is not None and not math.isfinite(target):
            raise UserError(f"target of AestheticGuidance must be a finite number, got {target}")
        self.head, self.pretrained, self.target = AestheticHead(head, clip), head, target

    def loss(self, images: Tensor) -> Tensor:
        """Minus the score, or how far it is from the target."""
        return aesthetic_loss(self.head(images), self.target)


class SymmetryGuidance(ImageGuidance):
    """Pictures that are their own mirror images, left to right. It needs no model, so it shows whether guidance works.

    Args:
        weight: factor of the loss in a sum of several.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)

    def loss(self, images: Tensor) -> Tensor:
        """Mean squared difference of the halves."""
        return mirror_error(images)
