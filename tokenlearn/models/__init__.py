"""Everything frozen: diffusion backbones and classifiers."""

from tokenlearn.models.backbone import Conditioning, DiffusionBackbone
from tokenlearn.models.classifier import TimmClassifier, save_classifier
from tokenlearn.models.frozen import FrozenModule, freeze
from tokenlearn.models.stable_diffusion import StableDiffusion

__all__ = [
    "Conditioning",
    "DiffusionBackbone",
    "FrozenModule",
    "StableDiffusion",
    "TimmClassifier",
    "freeze",
    "save_classifier",
]
