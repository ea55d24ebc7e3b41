"""How several noise predictions become one."""

from tokenlearn.guidance.classifier_free import ClassifierFreeGuidance, classifier_free_guidance
from tokenlearn.guidance.summed import SummedGuidance, summed_guidance

__all__ = ["ClassifierFreeGuidance", "SummedGuidance", "classifier_free_guidance", "summed_guidance"]
