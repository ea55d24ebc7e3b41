"""Rank correlation of a judge's logit with the scale of an edit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef


class RankCorrelations(NamedTuple):
    """Spearman's rank correlations, NaN where fewer than two scales are to be ranked.

    Attributes:
        needed: (B,) over the side of the scale that the image needs.
        both_sides: (B,) over all scales.
    """

    needed: Tensor
    both_sides: Tensor


def rank_correlation(logits: Tensor, scales: Tensor, present: Tensor) -> RankCorrelations:
    """Rank correlation of each image's logit with the scale at which the image was edited.

    An image needs the side of the scale that adds the attribute, or removes it if the attribute is present already.
    There is little to rank on the other side, where the judge is sure from the beginning.

    Args:
        logits: (B, S) the judge's logits at S scales.
        scales: (B, S), positive where the attribute is added.
        present: (B,) bool, whether the unedited image shows the attribute.
    """
    needed, both_sides = [], []
    for of_image, tried, shows_it in zip(logits, scales, present.tolist(), strict=True):
        side = tried <= 0 if shows_it else tried >= 0
        needed.append(_spearman(of_image[side], tried[side]))
        both_sides.append(_spearman(of_image, tried))
    return RankCorrelations(torch.stack(needed), torch.stack(both_sides))


def _spearman(values: Tensor, scales: Tensor) -> Tensor:
    return spearman_corrcoef(values, scales) if len(values) > 1 else values.new_tensor(torch.nan)
