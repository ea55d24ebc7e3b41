"""How several noise predictions become one."""

from tokenlearn.guidance.classifier_free import ClassifierFreeGuidance, classifier_free_guidance

__all__ = ["ClassifierFreeGuidance", "classifier_free_guidance"]
