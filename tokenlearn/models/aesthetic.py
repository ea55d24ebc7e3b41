"""Aesthetic heads: a rating of an image from its CLIP features."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenlearn.errors import UserError, reason_of
from tokenlearn.files import atomic_write
from tokenlearn.models.clip import ClipModel
from tokenlearn.models.frozen import FrozenModule, Precision, freeze, require_finite
from tokenlearn.paths import resolve


def build_aesthetic_head(feature_dim: int, hidden_sizes: Sequence[int] = ()) -> nn.Module:
    """A linear map from CLIP features to a score, or a perceptron with GELU between its layers.

    Args:
        feature_dim: dimension of the CLIP features.
        hidden_sizes: widths of the hidden layers; empty for the linear map.

    Returns:
        A module that maps (B, feature_dim) to (B, 1).
    """
    if not hidden_sizes:
        return nn.Linear(feature_dim, 1)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([feature_dim, *hidden_sizes]):
        layers += [nn.Linear(inputs, outputs), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(hidden_sizes[-1], 1))


class AestheticHead(FrozenModule):
    """A frozen rater of images: a CLIP and a head on its unit image features.

    Args:
        pretrained: folder written by :func:`save_aesthetic_head`, or file with the state dict of a linear head, such
            as LAION's ``sa_0_4_vit_l_14_linear.pth``. Weights are loaded as float32, whatever their stored type.
        clip: hub id or folder of the CLIP; None for the CLIP that the folder names.
        dtype: precision of the CLIP; that of the head is float32.

    Attributes:
        pretrained: as given.
        clip: the CLIP.

    Raises:
        UserError: if the folder or one of its files is missing or unreadable, the head does not fit the CLIP's
            features, or the CLIP cannot be loaded.
    """

    def __init__(self, pretrained: str, clip: str | None = None, dtype: Precision = "float32") -> None:
        super().__init__()
        source = Path(resolve(pretrained)).expanduser()
        if source.is_dir():
            config, weights = _read_folder(source)
        elif source.is_file():
            config, weights = {}, _read_weights(source)
        else:
            raise UserError(
                f"aesthetic head '{pretrained}' does not exist; give an existing folder or a file with the state dict "
                "of a linear head"
            )
        named = config.get("clip")
        clip_name = clip or _relative_to(source, named if isinstance(named, str) else None)
        if clip_name is None:
            raise UserError(f"aesthetic head '{pretrained}' does not name its CLIP; set 'clip'")
        self.pretrained = pretrained
        self.clip = ClipModel(clip_name, dtype)
        try:
            self.head = build_aesthetic_head(self.clip.feature_dim, config.get("hidden_sizes", ()))
            self.head.load_state_dict(weights)
        except Exception as error:  # any JSON and any pickle of tensors can be in the files
            raise UserError(
                f"aesthetic head '{pretrained}' does not fit the {self.clip.feature_dim} features of CLIP "
                f"'{clip_name}' ({reason_of(error)}); set 'clip' to the CLIP that the head was trained on"
            ) from error
        freeze(self)

    def forward(self, images: Tensor) -> Tensor:
        """Same as :meth:`score`."""
        return self.score(images)

    def score(self, images: Tensor) -> Tensor:
        """Rate images.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            (B,) float32 scores on the scale of the head's training ratings, usually 1 to 10; not clipped.

        Raises:
            UserError: if they are not finite, unless they have a gradient.
        """
        scores: Tensor = self.head(self.clip.image_features(images))
        return require_finite(scores.squeeze(1), images, self.pretrained)


def save_aesthetic_head(
    head: nn.Module, folder: str | os.PathLike[str], clip: str, hidden_sizes: Sequence[int] = ()
) -> Path:
    """Write a head to a folder that :class:`AestheticHead` loads: ``config.json``, half-precision safetensors.

    Args:
        head: a module from :func:`build_aesthetic_head`; it is not changed.
        folder: output folder; created if it does not exist.
        clip: CLIP of the head: a hub id, a folder, or a path that begins with a dot and is relative to ``folder``,
            such as ``../clip_guide``.
        hidden_sizes: as given to :func:`build_aesthetic_head`.

    Returns:
        The folder.
    """
    target = Path(folder)
    with atomic_write(target / "model.safetensors") as temporary:
        save_file(copy.deepcopy(head).half().state_dict(), temporary)
    with atomic_write(target / "config.json") as temporary:
        temporary.write_text(json.dumps({"clip": clip, "hidden_sizes": list(hidden_sizes)}, indent=2) + "\n")
    return target


def _relative_to(folder: Path, clip: str | None) -> str | None:
    """The CLIP that a folder's config names; paths that begin with a dot are relative to the folder."""
    return str(folder / clip) if clip is not None and clip.startswith(".") else clip


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(
                f"aesthetic head folder '{folder}' is incomplete: no '{name}'; download or export the head again"
            )
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__}, not an object")
    except ValueError as error:
        raise UserError(
            f"cannot read '{folder / 'config.json'}' ({reason_of(error)}); download or export the head again"
        ) from error
    return config, _read_weights(folder / "model.safetensors")


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(
            f"cannot load the aesthetic head in '{file}' ({reason_of(error)}); download or export it again"
        ) from error
    return weights
