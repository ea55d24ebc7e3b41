"""Preservation of the labels that an edit should not change."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor


def label_preservation(logits: Tensor, reference: Tensor, edited: Collection[int], multi_label: bool) -> Tensor:
    """Total variation distance between a classifier's other labels with and without an edit, per sample.

    Unlike a cross-entropy it is bounded, so an edit can still reach a class that excludes another label, such as bald
    and curls. It is not part of the CASO paper, whose reconstruction loss does not separate correlated attributes such
    as beard and man.

    Args:
        logits: (B, K) classifier outputs of edited images.
        reference: (B, K) classifier outputs of the same images without the edit.
        edited: labels that may change, in [0, K).
        multi_label: whether the labels are independent sigmoids, each with a total variation, instead of one softmax,
            which is then renormalised over the other labels.

    Returns:
        (B,) in [0, 1], the mean over labels for independent sigmoids; 0 if there is no other label.
    """
    preserved = [label for label in range(logits.shape[1]) if label not in edited]
    if not preserved:
        return logits.new_zeros(len(logits))
    if multi_label:
        return (logits[:, preserved].sigmoid() - reference[:, preserved].sigmoid()).abs().mean(dim=1)
    difference = logits[:, preserved].softmax(dim=1) - reference[:, preserved].softmax(dim=1)
    return difference.abs().sum(dim=1) / 2
