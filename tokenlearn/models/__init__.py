"""Frozen models: diffusion backbones, classifiers, CLIPs and aesthetic heads. Each is imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenlearn.models.aesthetic import AestheticHead
    from tokenlearn.models.backbones.base import DiffusionBackbone
    from tokenlearn.models.backbones.conditioning import Conditioning
    from tokenlearn.models.backbones.deepfloyd_if import DeepFloydIF
    from tokenlearn.models.backbones.stable_diffusion import StableDiffusion
    from tokenlearn.models.backbones.stable_diffusion_xl import StableDiffusionXL
    from tokenlearn.models.classifier import TimmClassifier
    from tokenlearn.models.clip import ClipModel
    from tokenlearn.models.frozen import FrozenModule, freeze

_MODULES = {
    "AestheticHead": "aesthetic",
    "ClipModel": "clip",
    "Conditioning": "backbones.conditioning",
    "DeepFloydIF": "backbones.deepfloyd_if",
    "DiffusionBackbone": "backbones.base",
    "FrozenModule": "frozen",
    "StableDiffusion": "backbones.stable_diffusion",
    "StableDiffusionXL": "backbones.stable_diffusion_xl",
    "TimmClassifier": "classifier",
    "freeze": "frozen",
}

__all__ = [
    "AestheticHead",
    "ClipModel",
    "Conditioning",
    "DeepFloydIF",
    "DiffusionBackbone",
    "FrozenModule",
    "StableDiffusion",
    "StableDiffusionXL",
    "TimmClassifier",
    "freeze",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
