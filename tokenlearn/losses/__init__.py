"""Losses: pure functions of images, logits, features or latents, and the interface of objectives."""

from tokenlearn.losses.aesthetic import aesthetic_loss
from tokenlearn.losses.attribute_logits import AttributeClass, attribute_directions, attribute_logits
from tokenlearn.losses.caso import (
    AttributeInClassifier,
    CasoObjective,
    CasoTerms,
    EditedImages,
    EditingLoss,
    class_mean_cosine,
    label_preservation,
    latent_reconstruction,
    probability_error,
)
from tokenlearn.losses.class_cross_entropy import class_cross_entropy
from tokenlearn.losses.classified_as import is_classified_as
from tokenlearn.losses.clip_distance import mean_direction, spherical_distance
from tokenlearn.losses.denoising import MinSNR, denoising_error
from tokenlearn.losses.objective import Crops, Objective, ObjectiveSum, as_objective
from tokenlearn.losses.symmetry import mirror_error

__all__ = [
    "AttributeClass",
    "AttributeInClassifier",
    "CasoObjective",
    "CasoTerms",
    "Crops",
    "EditedImages",
    "EditingLoss",
    "MinSNR",
    "Objective",
    "ObjectiveSum",
    "aesthetic_loss",
    "as_objective",
    "attribute_directions",
    "attribute_logits",
    "class_cross_entropy",
    "class_mean_cosine",
    "denoising_error",
    "is_classified_as",
    "label_preservation",
    "latent_reconstruction",
    "mean_direction",
    "mirror_error",
    "probability_error",
    "spherical_distance",
]
