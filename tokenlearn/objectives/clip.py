"""Objectives in the space of a CLIP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tokenlearn.errors import UserError, reason_of
from tokenlearn.losses.clip_distance import mean_direction, spherical_distance
from tokenlearn.losses.objective import Crops, Objective
from tokenlearn.models.clip import ClipModel
from tokenlearn.models.frozen import Precision
from tokenlearn.paths import resolve

_TARGET = "{}"


class _CLIPLoss(Objective):
    """Half of the squared angle between an image and a direction; the score is their cosine."""

    score_kind = "similarity"
    score_name = "clip_similarity"

    def __init__(self, clip: str | ClipModel, weight: float, crops: Crops | None, dtype: Precision) -> None:
        super().__init__(weight, crops)
        self.clip = ClipModel(clip, dtype) if isinstance(clip, str) else clip
        self.pretrained = self.clip.pretrained

    def direction(self, targets: Sequence[str] | None) -> Tensor:
        """Unit vectors that images should point along: (D,), or (B, D) where they depend on the targets."""
        raise NotImplementedError

    def loss(self, images: Tensor, targets: Sequence[str] | None = None) -> Tensor:
        """Half of the squared angle (B,) to the direction."""
        return spherical_distance(self.clip.image_features(images), self.direction(targets))

    def score(self, images: Tensor, targets: Sequence[str] | None = None) -> Tensor:
        """Cosine (B,) of the angle to the direction."""
        return _cosine(self.clip.image_features(images), self.direction(targets))

    def loss_and_score(
        self, images: Tensor, targets: Sequence[str] | None = None, step: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Loss and score (B,) from one evaluation of the CLIP, unless the loss is over crops."""
        if self.crops is not None:
            return super().loss_and_score(images, targets, step)
        features, direction = self.clip.image_features(images), self.direction(targets)
        return self.weight * spherical_distance(features, direction), _cosine(features.detach(), direction)


class CLIPTextLoss(_CLIPLoss):
    """Distance of images from a text in the space of a CLIP; the score is their cosine.

    Args:
        clip: hub id or folder, or a loaded CLIP.
        text: what images should show. ``{}`` in it is the target of each image, such as a class name; null for the
            target alone. Without ``{}``, targets are ignored. Or target to text, such as each class with its
            description.
        weight: factor of the loss.
        crops: random crops to average the loss over; null for the whole image.
        dtype: precision of the CLIP, if it is given by name; the backbone's saves memory.

    Raises:
        UserError: if the text is empty, or the CLIP cannot be loaded.
    """

    def __init__(
        self,
        clip: str | ClipModel,
        text: str | dict[str, str] | None = None,
        *,
        weight: float = 1.0,
        crops: Crops | None = None,
        dtype: Precision = "float32",
    ) -> None:
        texts = list(text.values()) if isinstance(text, dict) else [_TARGET if text is None else text]
        if not texts or not all(part.strip() for part in texts):
            raise UserError("text of CLIPTextLoss is empty; describe what images should show")
        super().__init__(clip, weight, crops, dtype)
        self.text = text if isinstance(text, dict) else texts[0]
        self.uses_targets = isinstance(self.text, dict) or _TARGET in self.text
        self._directions: dict[str, Tensor] = {}
        if not self.uses_targets:
            with torch.no_grad():
                self.register_buffer("_direction", self.clip.text_features(texts)[0], persistent=False)

    def direction(self, targets: Sequence[str] | None) -> Tensor:
        """Unit vector (D,) of the text if all images have the same text, else (B, D) of the text of each target.

        Raises:
            UserError: if the text needs targets and there are none, or a target has no text.
        """
        if not self.uses_targets:
            return self.get_buffer("_direction")
        self.check(targets)
        assert targets is not None
        if len(set(targets)) == 1:
            return self._text_direction(targets[0])
        return torch.stack([self._text_direction(target) for target in targets])

    def losses(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Losses (B, K) towards each of K targets, from one evaluation of the images."""
        if not self.uses_targets:
            return super().losses(images, names)
        features = self.clip.image_features(images)
        self.check(names)
        return spherical_distance(features[:, None], torch.stack([self._text_direction(name) for name in names]))

    def check(self, targets: Sequence[str] | None = None) -> None:
        """Refuse a text that needs targets where there are none, and targets without a text.

        Raises:
            UserError: naming the text or the target.
        """
        if self.uses_targets and targets is None:
            raise UserError(f"text '{self.text}' of CLIPTextLoss has no target here; set a text without {_TARGET}")
        if isinstance(self.text, dict) and (missing := sorted(set(targets or ()) - self.text.keys())):
            raise UserError(
                f"text of CLIPTextLoss has nothing for '{missing[0]}', only for {', '.join(self.text)}; add it"
            )

    def texts(self, target: str | None = None) -> Iterator[str]:
        """The text of a target, or the text of all."""
        yield self._text(target) if target is not None and self.uses_targets else str(self.text)

    def _text(self, target: str) -> str:
        return self.text[target] if isinstance(self.text, dict) else self.text.replace(_TARGET, target)

    def _text_direction(self, target: str) -> Tensor:
        if target not in self._directions:
            text = self._text(target)
            # A tensor of inference mode could not be used in a later step that needs gradients.
            with torch.inference_mode(False), torch.no_grad():
                self._directions[target] = self.clip.text_features([text])[0]
        return self._directions[target].to(self.clip.mean.device)


class CLIPImageLoss(_CLIPLoss):
    """Distance of images from example images in the space of a CLIP (DOODL's personalisation).

    Args:
        clip: hub id or folder, or a loaded CLIP.
        images: example image files; of several, the mean direction is the target.
        weight: factor of the loss.
        crops: random crops to average the loss over; null for the whole image.
        dtype: precision of the CLIP, if it is given by name; the backbone's saves memory.

    Raises:
        UserError: if there are no files, a file cannot be read, or the CLIP cannot be loaded.
    """

    def __init__(
        self,
        clip: str | ClipModel,
        images: list[str],
        *,
        weight: float = 1.0,
        crops: Crops | None = None,
        dtype: Precision = "float32",
    ) -> None:
        if not images:
            raise UserError("images of CLIPImageLoss is empty; give at least one image file")
        examples = [_read(file) for file in images]
        super().__init__(clip, weight, crops, dtype)
        with torch.no_grad():
            features = torch.cat([self.clip.image_features(example) for example in examples])
            self.register_buffer("_direction", mean_direction(features), persistent=False)

    def direction(self, targets: Sequence[str] | None) -> Tensor:
        """Mean direction (D,) of the examples; ``targets`` are ignored."""
        return self.get_buffer("_direction")


def _cosine(features: Tensor, direction: Tensor) -> Tensor:
    """Cosines (B,) of unit vectors (B, D) with a unit vector (D,), or with one each (B, D)."""
    return features @ direction if direction.ndim == 1 else (features * direction).sum(dim=-1)


def _read(file: str) -> Tensor:
    """An image file (1, 3, H, W) in [0, 1], upright."""
    from tokenlearn.data.pixels import to_rgb, unit_range

    try:
        with Image.open(Path(resolve(file)).expanduser()) as opened:
            image = to_rgb(ImageOps.exif_transpose(opened))
    except Exception as error:  # decoders raise errors of many types
        raise UserError(
            f"cannot read image '{file}' of CLIPImageLoss ({reason_of(error)}); name another file"
        ) from error
    return unit_range([torch.from_numpy(np.array(image))])
