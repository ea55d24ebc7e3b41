"""Cosine distance from the direction of a class mean."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def class_mean_cosine(features: Tensor, targets: Tensor, class_directions: Tensor, global_mean: Tensor) -> Tensor:
    """One minus the cosine between centred features and the target class's direction, per sample.

    ``1 - cos(h - mu_G, mu_a)`` with ``mu_a = m_a - mu_G`` the centred mean of the class. In a collapsed classifier
    (Papyan, Han and Donoho, 2020, https://arxiv.org/abs/2008.08186) the rows of the last layer point along the
    ``mu_a``. CASO (https://arxiv.org/abs/2505.14254) finds the same alignment in its embeddings. Unlike probabilities,
    the cosine does not saturate: it ranks two images that are both classified with certainty.

    Args:
        features: (B, F) penultimate features h.
        targets: (B,) indices of the target classes, int64.
        class_directions: (K, F) centred class means mu_a or substitutes for them; their lengths do not matter.
        global_mean: (F,) mean mu_G of all features.

    Returns:
        (B,) losses in [0, 2], not reduced.
    """
    return 1 - functional.cosine_similarity(
        features - global_mean.to(features), class_directions.to(features)[targets]
    )
