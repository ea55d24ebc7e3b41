"""Editing loss of CASO's released code."""

from __future__ import annotations

from torch import Tensor


def probability_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Squared distance of the target class's probability from 1, per sample.

    ``(1 - p_target)^2`` with p the softmax of the logits. For the two classes of a binary attribute, with logits
    ``[l, 0]`` (see :func:`tokenlearn.losses.attribute_logits`), it equals CASO's released loss ``(a - sigmoid(l))^2``
    (https://arxiv.org/abs/2505.14254) with ``a`` = 1 for the first class and 0 for the second. Its gradient vanishes
    where the classifier is confident, even of the wrong class; the gradient of
    :func:`tokenlearn.losses.class_cross_entropy` does not.

    Args:
        logits: (B, K) classifier outputs before softmax.
        targets: (B,) indices of the target classes, int64.

    Returns:
        (B,) losses in [0, 1], not reduced.
    """
    return (1 - logits.softmax(dim=1).gather(1, targets[:, None]).squeeze(1)).square()
