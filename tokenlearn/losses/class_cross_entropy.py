"""Cross-entropy towards a class, the loss of discriminative class tokens."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def class_cross_entropy(logits: Tensor, targets: Tensor, multi_label: bool = False) -> Tensor:
    """Negative log-probability of the target class, per sample.

    Discriminative class tokens (Schwartz et al., 2023, https://arxiv.org/abs/2303.17155) minimise it over generated
    images. It is computed from logits, so its gradient does not vanish where the classifier is confident of another
    class.

    Args:
        logits: (B, K) classifier outputs before softmax or sigmoid.
        targets: (B,) indices of the target classes, int64.
        multi_label: whether the K outputs are independent sigmoids. The loss is then ``-log sigmoid(logit)`` of the
            target class and does not depend on the other classes.

    Returns:
        (B,) losses, not reduced.
    """
    if multi_label:
        return functional.softplus(-logits.gather(1, targets[:, None]).squeeze(1))
    return functional.cross_entropy(logits, targets, reduction="none")
