"""Frozen CLIP models of transformers: images and texts as unit vectors in one space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenlearn.errors import UserError, reason_of
from tokenlearn.models.frozen import FrozenModule, Precision, freeze, require_finite
from tokenlearn.paths import resolve
from tokenlearn.quiet import quiet_models

_INTERPOLATION = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""Torch's names of Pillow's filters; torch has no other filters."""


class ClipModel(FrozenModule):
    """A frozen CLIP (Radford et al., 2021, https://arxiv.org/abs/2103.00020), differentiable in its images.

    Args:
        pretrained: hub id (``openai/clip-vit-large-patch14``, ``laion/CLIP-ViT-g-14-laion2B-s12B-b42K``), or folder
            that transformers' ``CLIPModel``, ``CLIPImageProcessor`` and ``CLIPTokenizer`` can load.
        dtype: precision of the weights, whatever their stored type. Under an autocast to half precision, every
            evaluation whose gradient is needed holds a copy of weights in float32, and none of weights in its own
            precision.

    Attributes:
        pretrained: as given.
        feature_dim: D, the dimension of the space of images and texts.
        max_prompt_length: maximum number of tokens of a text, including the start and end tokens.

    Raises:
        UserError: if the folder or one of its files is missing or unreadable, the hub cannot provide the model, or
            the model is not a CLIP.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, pretrained: str, dtype: Precision = "float32") -> None:
        super().__init__()
        model, tokenizer, processor = _load(pretrained)
        self.model = model.to(getattr(torch, dtype))
        self.tokenizer = tokenizer
        self.pretrained = pretrained
        self.feature_dim = int(model.config.projection_dim)
        self.max_prompt_length = int(min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings))
        self._size = dict(processor.size) if processor.do_resize else None
        self._crop = dict(processor.crop_size) if processor.do_center_crop else None
        self._interpolation = _INTERPOLATION.get(int(processor.resample), "bicubic")
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
        if not all(math.isfinite(value) for value in mean) or not all(0 < value < math.inf for value in std):
            raise UserError(
                f"CLIP '{pretrained}' normalises by image_mean {mean} and image_std {std}; correct them in its "
                "preprocessor_config.json to finite numbers, the std above 0"
            )
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1), persistent=False)
        freeze(self)

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize with antialiasing, centre crop and normalise as the model's image processor does, differentiably.

        Args:
            images: (B, 3, H, W) in [0, 1]; values outside are not clamped, so they keep their gradient.

        Returns:
            (B, 3, h, w) network inputs.
        """
        if self._size is not None:
            images = self._resize(images, *self._resized(*images.shape[-2:]))
        if self._crop is not None:
            images = _center_crop(images, self._crop["height"], self._crop["width"])
        return (images - self.mean) / self.std

    def image_features(self, images: Tensor) -> Tensor:
        """Directions of images.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            (B, D) float32 unit vectors.

        Raises:
            UserError: if they are not finite, unless they have a gradient.
        """
        # The return type of `get_image_features` depends on the version of transformers.
        pixels = self.preprocess(images).to(self.model.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        features = functional.normalize(self.model.visual_projection(pooled).float(), dim=-1)
        return require_finite(features, images, self.pretrained)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Directions of texts. Texts longer than ``max_prompt_length`` are truncated.

        Args:
            prompts: B texts.

        Returns:
            (B, D) float32 unit vectors.
        """
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.max_prompt_length, return_tensors="pt"
        ).to(self.mean.device)
        pooled = self.model.text_model(**tokens).pooler_output
        return functional.normalize(self.model.text_projection(pooled).float(), dim=-1)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing: fixed, or from the length of the shorter edge."""
        assert self._size is not None
        if "shortest_edge" not in self._size:
            return self._size["height"], self._size["width"]
        edge, shorter = self._size["shortest_edge"], min(height, width)
        return int(edge * height / shorter), int(edge * width / shorter)

    def _resize(self, images: Tensor, height: int, width: int) -> Tensor:
        if images.shape[-2:] == (height, width):
            return images
        antialias = self._interpolation != "nearest-exact"
        return functional.interpolate(images, (height, width), mode=self._interpolation, antialias=antialias)


def _center_crop(images: Tensor, height: int, width: int) -> Tensor:
    """The centre of images; smaller images get black borders."""
    missing_height, missing_width = max(0, height - images.shape[-2]), max(0, width - images.shape[-1])
    if missing_height or missing_width:
        left, top = missing_width // 2, missing_height // 2
        images = functional.pad(images, (left, missing_width - left, top, missing_height - top))
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def _load(pretrained: str) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor.

    Raises:
        UserError: if one of them is missing, unreadable or incomplete.
    """
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = Path(resolve(pretrained)).expanduser()
    local = folder.is_dir()
    source = str(folder) if local else pretrained
    if local:
        _check_folder(folder)
    elif pretrained.startswith((".", "/", "~")) or pretrained.count("/") != 1:
        raise UserError(f"CLIP folder '{pretrained}' does not exist; give an existing folder or a hub id (owner/name)")
    try:
        clip_class: Any = CLIPModel
        with quiet_models():
            model, info = clip_class.from_pretrained(source, output_loading_info=True)
            tokenizer = CLIPTokenizer.from_pretrained(source)
            processor = CLIPImageProcessor.from_pretrained(source)
    except Exception as error:  # a damaged folder can fail in any way
        if local:
            raise UserError(
                f"cannot load the CLIP in '{pretrained}' ({reason_of(error)}); download or export it again"
            ) from error
        raise UserError(
            f"CLIP '{pretrained}' is not a folder, and the hub cannot provide it ({reason_of(error)}); check the name "
            "and the network, or give a local folder"
        ) from error
    # transformers initialises missing weights at random and only warns.
    if info["missing_keys"]:
        raise UserError(
            f"'{pretrained}' is not a complete CLIP: its files lack '{min(info['missing_keys'])}'; give a model with "
            "an image encoder and a text encoder"
        )
    return model, tokenizer, processor


def _check_folder(folder: Path) -> None:
    """Refuse an incomplete folder.

    Raises:
        UserError: naming the first missing file.
    """
    for names in (
        ("config.json",),
        ("preprocessor_config.json", "processor_config.json"),
        ("vocab.json", "tokenizer.json"),
        ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if not any((folder / name).is_file() for name in names):
            raise UserError(
                f"CLIP folder '{folder}' is incomplete: no '{names[0]}'; download or export the model again"
            )
