"""Guidance rules: how several predictions become one."""

from tokenlearn.guidance.base import GuidanceRule, Run, require_differentiable
from tokenlearn.guidance.classifier import ClassifierGuidance
from tokenlearn.guidance.classifier_free import ClassifierFreeGuidance, classifier_free_guidance
from tokenlearn.guidance.composable import ComposableGuidance, composable_guidance
from tokenlearn.guidance.concepts import SEGA, SemanticEdit, check_tokens, parse_concept
from tokenlearn.guidance.guided_model import GuidedModel
from tokenlearn.guidance.safe import (
    SAFETY_PRESETS,
    SafeGuidance,
    SafetySettings,
    safely_guided,
    safety_guidance,
    safety_scale,
)
from tokenlearn.guidance.semantic import (
    Concept,
    ConceptSettings,
    RecordedGuidance,
    SemanticGuidance,
    concept_guidance,
    semantic_direction,
    semantically_guided,
    tail_mask,
    total_guidance,
    update_momentum,
    with_momentum,
)
from tokenlearn.guidance.tfg import TFG, TFGSettings
from tokenlearn.guidance.trajectory import Trajectory, sample_trajectory

__all__ = [
    "SAFETY_PRESETS",
    "SEGA",
    "TFG",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "ComposableGuidance",
    "Concept",
    "ConceptSettings",
    "GuidanceRule",
    "GuidedModel",
    "RecordedGuidance",
    "Run",
    "SafeGuidance",
    "SafetySettings",
    "SemanticEdit",
    "SemanticGuidance",
    "TFGSettings",
    "Trajectory",
    "check_tokens",
    "classifier_free_guidance",
    "composable_guidance",
    "concept_guidance",
    "parse_concept",
    "require_differentiable",
    "safely_guided",
    "safety_guidance",
    "safety_scale",
    "sample_trajectory",
    "semantic_direction",
    "semantically_guided",
    "tail_mask",
    "total_guidance",
    "update_momentum",
    "with_momentum",
]
