"""Adapters of diffusion models, one file per family."""

from tokenlearn.models.backbones.base import DiffusionBackbone
from tokenlearn.models.backbones.conditioning import Conditioning
from tokenlearn.models.backbones.deepfloyd_if import DeepFloydIF
from tokenlearn.models.backbones.stable_diffusion import StableDiffusion
from tokenlearn.models.backbones.stable_diffusion_xl import StableDiffusionXL

__all__ = ["Conditioning", "DeepFloydIF", "DiffusionBackbone", "StableDiffusion", "StableDiffusionXL"]
