"""Diffusion maths on tensors: conversions between kinds of prediction, and sampling with a chosen gradient path."""

from tokenlearn.diffusion.sampling import sample
from tokenlearn.diffusion.schedule import PredictionType, add_noise, convert

__all__ = ["PredictionType", "add_noise", "convert", "sample"]
