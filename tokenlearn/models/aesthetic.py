"""Aesthetic heads: how pleasing a picture is, from its CLIP features."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenlearn.errors import UserError, reason_of
from tokenlearn.files import atomic_write
from tokenlearn.models.clip import ClipModel
from tokenlearn.models.frozen import FrozenModule, freeze


def build_aesthetic_head(feature_dim: int, hidden_sizes: Sequence[int] = ()) -> nn.Module:
    """A linear map of CLIP features to a score, or a perceptron with the given hidden layers.

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
    """A frozen rater of pictures: a head on the unit image features of a CLIP that it brings along.

    Args:
        pretrained: folder of :func:`save_aesthetic_head`, or a file with the state dict of a linear head, such as
            LAION's ``sa_0_4_vit_l_14_linear.pth``. Weights are loaded as float32 whatever they are stored as.
        clip: hub id or folder of the CLIP; None for the one that the folder names.

    Attributes:
        pretrained: as given.
        clip: the CLIP.

    Raises:
        UserError: if the folder or one of its files is missing or unreadable, the head is not one of the CLIP's
            features, or the CLIP cannot be loaded.
    """

    def __init__(self, pretrained: str, clip: str | None = None) -> None:
        super().__init__()
        source = Path(pretrained).expanduser()
        if source.is_dir():
            config, weights = _read_folder(source)
        elif source.is_file():
            config, weights = {}, _read_weights(source)
        else:
            raise UserError(
                f"aesthetic head '{pretrained}' does not exist; give an existing folder, or a file with the state "
                "dict of a linear head"
            )
        named = clip or _beside(source, config.get("clip"))
        if named is None:
            raise UserError(f"aesthetic head '{pretrained}' does not say which CLIP it is for; name it as 'clip'")
        self.pretrained = pretrained
        self.clip = ClipModel(named)
        self.head = build_aesthetic_head(self.clip.feature_dim, config.get("hidden_sizes", ()))
        try:
            self.head.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(
                f"aesthetic head '{pretrained}' does not fit the {self.clip.feature_dim} features of CLIP '{named}' "
                f"({reason_of(error)}); name the CLIP that it was trained on as 'clip'"
            ) from error
        freeze(self)

    def forward(self, images: Tensor) -> Tensor:
        """Same as :meth:`score`."""
        return self.score(images)

    def score(self, images: Tensor) -> Tensor:
        """Rate pictures.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            (B,) float32 scores in the units of the ratings that the head was trained on, usually 1 to 10; not clipped.
        """
        scores: Tensor = self.head(self.clip.image_features(images))
        return scores.squeeze(1)


def save_aesthetic_head(
    head: nn.Module, folder: str | os.PathLike[str], clip: str, hidden_sizes: Sequence[int] = ()
) -> Path:
    """Write a head as ``config.json`` and half-precision ``model.safetensors``, which :class:`AestheticHead` loads.

    Args:
        head: a module of :func:`build_aesthetic_head`; it is not changed.
        folder: where to write; made if it does not exist.
        clip: the CLIP that the head is for: a hub id, a folder, or a folder seen from ``folder`` that begins with a
            dot, such as ``../clip_guide``.
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


def _beside(folder: Path, clip: str | None) -> str | None:
    """A CLIP as named in a folder's config; paths that begin with a dot start at the folder."""
    return str(folder / clip) if clip is not None and clip.startswith(".") else clip


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(
                f"aesthetic head folder '{folder}' is incomplete: no '{name}'; download or export the head again"
            )
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"cannot load the aesthetic head in '{file}' ({reason_of(error)}); download or export it again"
        ) from error
    return weights
