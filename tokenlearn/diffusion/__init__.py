"""Diffusion maths on tensors: conversions between kinds of prediction, sampling and inversion with a gradient path."""

from tokenlearn.diffusion.inversion import invert
from tokenlearn.diffusion.sampling import sample
from tokenlearn.diffusion.schedule import PredictionType, add_noise, convert

__all__ = ["PredictionType", "add_noise", "convert", "invert", "sample"]
