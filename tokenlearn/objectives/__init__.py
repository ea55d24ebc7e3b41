"""Objectives with the frozen models that they need: a finished image to a loss and a score."""

from tokenlearn.losses.objective import Crops, Objective, ObjectiveSum, as_objective
from tokenlearn.objectives.aesthetic import AestheticLoss
from tokenlearn.objectives.classifier import ClassifierLoss
from tokenlearn.objectives.clip import CLIPImageLoss, CLIPTextLoss
from tokenlearn.objectives.judges import have_same_weights, is_same_model, require_judge_differs
from tokenlearn.objectives.symmetry import SymmetryLoss

__all__ = [
    "AestheticLoss",
    "CLIPImageLoss",
    "CLIPTextLoss",
    "ClassifierLoss",
    "Crops",
    "Objective",
    "ObjectiveSum",
    "SymmetryLoss",
    "as_objective",
    "have_same_weights",
    "is_same_model",
    "require_judge_differs",
]
