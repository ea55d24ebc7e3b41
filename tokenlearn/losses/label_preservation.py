"""Leaving alone what a classifier sees besides the class that is edited."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor


def label_preservation(logits: Tensor, reference: Tensor, edited: Collection[int], multi_label: bool) -> Tensor:
    """How far an edit moves a classifier's other labels: the total variation of their distribution, per sample.

    Bounded, unlike a cross-entropy, so that a class may win over those that it rules out: nobody bald has curls. Not
    in the paper of CASO, whose reconstruction loss does not tell a beard from a man.

    Args:
        logits: (B, K) classifier outputs for edited pictures.
        reference: (B, K) the same without the edit.
        edited: labels that may change, in [0, K).
        multi_label: whether the labels are independent sigmoids, each with a variation of its own, instead of one
            softmax, which is then over the labels that are not edited.

    Returns:
        (B,) in [0, 1], the mean over labels if these are independent; 0 where no other label is left.
    """
    kept = [label for label in range(logits.shape[1]) if label not in edited]
    if not kept:
        return logits.new_zeros(len(logits))
    if multi_label:
        return (logits[:, kept].sigmoid() - reference[:, kept].sigmoid()).abs().mean(dim=1)
    difference = logits[:, kept].softmax(dim=1) - reference[:, kept].softmax(dim=1)
    return difference.abs().sum(dim=1) / 2
