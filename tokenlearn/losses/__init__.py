"""Pixels, logits or features to a scalar per sample."""

from tokenlearn.losses.class_cross_entropy import class_cross_entropy

__all__ = ["class_cross_entropy"]
