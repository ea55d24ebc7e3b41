"""Diffusion maths on tensors: conversions between kinds of prediction, sampling and inversion with a gradient path."""

from tokenlearn.diffusion.edit_friendly import Inverted, edit_friendly_noise
from tokenlearn.diffusion.full_chain import GradientChain, invert_full_chain, sample_full_chain
from tokenlearn.diffusion.inversion import invert
from tokenlearn.diffusion.sampling import sample
from tokenlearn.diffusion.schedule import PredictionType, add_noise, convert

__all__ = [
    "GradientChain",
    "Inverted",
    "PredictionType",
    "add_noise",
    "convert",
    "edit_friendly_noise",
    "invert",
    "invert_full_chain",
    "sample",
    "sample_full_chain",
]
