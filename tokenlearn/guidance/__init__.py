"""How several noise predictions become one."""

from tokenlearn.guidance.classifier_free import ClassifierFreeGuidance, classifier_free_guidance
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
from tokenlearn.guidance.summed import SummedGuidance, summed_guidance

__all__ = [
    "SAFETY_PRESETS",
    "ClassifierFreeGuidance",
    "Concept",
    "ConceptSettings",
    "RecordedGuidance",
    "SafeGuidance",
    "SafetySettings",
    "SemanticGuidance",
    "SummedGuidance",
    "classifier_free_guidance",
    "concept_guidance",
    "safely_guided",
    "safety_guidance",
    "safety_scale",
    "semantic_direction",
    "semantically_guided",
    "summed_guidance",
    "tail_mask",
    "total_guidance",
    "update_momentum",
    "with_momentum",
]
