"""Loss of an aesthetic score."""

from __future__ import annotations

from torch import Tensor


def aesthetic_loss(scores: Tensor, target: float | None = None) -> Tensor:
    """Aesthetic loss of DOODL per sample: minus the score, or its distance from a target.

    ``-score`` or ``|score - target|`` (Wallace et al., 2023, https://arxiv.org/abs/2303.13703). Scores are not
    clipped. The released code clips them to the range of the ratings, which leaves images outside the range without a
    gradient.

    Args:
        scores: (B,) scores of an aesthetic head, on the scale of its ratings (usually 1 to 10).
        target: score to reach; None to raise the score without limit.

    Returns:
        (B,) losses, not reduced.
    """
    return -scores if target is None else (scores - target).abs()
