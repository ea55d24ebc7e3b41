"""Decision of a classifier from its logits."""

from __future__ import annotations

from torch import Tensor


def is_classified_as(logits: Tensor, targets: Tensor, multi_label: bool) -> Tensor:
    """Whether a classifier assigns each image to its target class.

    Args:
        logits: (B, K) classifier outputs before softmax or sigmoid.
        targets: (B,) class indices, int64.
        multi_label: whether the outputs are independent sigmoids, where the target's logit must be positive, instead
            of one softmax, where it must be the largest.

    Returns:
        (B,) bool.
    """
    if multi_label:
        return logits.gather(1, targets[:, None])[:, 0] > 0
    return logits.argmax(dim=1) == targets
