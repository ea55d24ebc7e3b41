"""Everything frozen: diffusion backbones and classifiers."""

from tokenlearn.models.backbone import Conditioning, DiffusionBackbone
from tokenlearn.models.classifier import TimmClassifier, save_classifier
from tokenlearn.models.deepfloyd_if import DeepFloydIF
from tokenlearn.models.frozen import FrozenModule, freeze
from tokenlearn.models.stable_diffusion import StableDiffusion
from tokenlearn.models.stable_diffusion_xl import StableDiffusionXL

__all__ = [
    "Conditioning",
    "DeepFloydIF",
    "DiffusionBackbone",
    "FrozenModule",
    "StableDiffusion",
    "StableDiffusionXL",
    "TimmClassifier",
    "freeze",
    "save_classifier",
]
