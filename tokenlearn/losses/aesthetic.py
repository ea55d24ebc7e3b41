"""How pleasing pictures should be."""

from __future__ import annotations

from torch import Tensor


def aesthetic_loss(scores: Tensor, target: float | None = None) -> Tensor:
    """The aesthetic losses of DOODL, per sample: more pleasing without end, or as pleasing as asked.

    ``-score``, or ``|score - target|`` (Wallace et al., 2023, https://arxiv.org/abs/2303.13703). Scores are taken as
    they are: clipping them to the range of the ratings, as the released code does, leaves pictures outside of it
    without a gradient.

    Args:
        scores: (B,) scores of an aesthetic head, in the units of its ratings (usually 1 to 10).
        target: score to reach; None to raise the score without end.

    Returns:
        (B,) losses, not reduced.
    """
    return -scores if target is None else (scores - target).abs()
