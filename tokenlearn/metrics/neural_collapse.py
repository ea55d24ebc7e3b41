"""Neural collapse: how close a classifier's features are to their class means.

Papyan, Han and Donoho, "Prevalence of neural collapse during the terminal phase of deep learning training", PNAS 2020,
https://arxiv.org/abs/2008.08186. All measures are 0 for a fully collapsed classifier. The paper's classes have equally
many images. Here every class counts the same in the centre of the class means and in the scatter within classes, so
that the measures describe the classifier and not the frequency of the classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from tokenlearn.errors import UserError


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(dim=0)


def within_class_variability(within_scatter: Tensor, class_means: Tensor) -> Tensor:
    """NC1, ``trace(Sigma_W pinv(Sigma_B)) / K``: scatter within classes relative to scatter of the class means.

    Args:
        within_scatter: (F, F) mean outer product Sigma_W of features minus their class mean; the mean over the images
            of each class, then over classes.
        class_means: (K, F).

    Returns:
        (), at least 0; 0 if all features of a class are equal.
    """
    # With C (K, F) the centred means, Sigma_B = C^T C / K has the pseudo-inverse K P P^T, where P = pinv(C) (F, K).
    # One singular value of C is zero up to rounding; the tolerance must exceed it.
    inverse = torch.linalg.pinv(_centred(class_means), rtol=1e-8)
    return torch.einsum("fk,fg,gk->", inverse, within_scatter, inverse)


def equiangularity(class_means: Tensor) -> Tensor:
    """NC2, standard deviation of the cosines between centred class means.

    It is 0 for a simplex, and always for K = 2: two means lie opposite each other about their centre.

    Args:
        class_means: (K, F).

    Returns:
        () in [0, 1].
    """
    deviation: Tensor = _cosines(class_means).std(correction=0)
    return deviation


def maximal_angle(class_means: Tensor) -> Tensor:
    """NC2, mean distance ``|cos + 1 / (K - 1)|`` of the cosines between centred class means from those of a simplex.

    No K directions lie further apart than a simplex's. It is always 0 for K = 2.

    Args:
        class_means: (K, F).

    Returns:
        (), at least 0.
    """
    distance: Tensor = (_cosines(class_means) + 1 / (len(class_means) - 1)).abs().mean()
    return distance


def _cosines(class_means: Tensor) -> Tensor:
    """Cosines (K (K - 1) / 2,) between centred class means."""
    directions = functional.normalize(_centred(class_means), dim=1)
    rows, columns = torch.triu_indices(len(directions), len(directions), offset=1, device=directions.device)
    return (directions @ directions.T)[rows, columns]


def equinorm(class_means: Tensor) -> Tensor:
    """NC2, standard deviation of the norms of the centred class means, relative to their mean.

    It is 0 for a simplex, and always for K = 2.

    Args:
        class_means: (K, F).

    Returns:
        (), at least 0.
    """
    norms = _centred(class_means).norm(dim=1)
    ratio: Tensor = norms.std(correction=0) / norms.mean()
    return ratio


def self_duality(class_means: Tensor, head_rows: Tensor) -> Tensor:
    """NC3, ``|| W / ||W||_F - M / ||M||_F ||_F``: distance of the head from the class means, each up to a factor.

    Both are centred, which leaves the probabilities of a softmax unchanged.

    Args:
        class_means: (K, F) M.
        head_rows: (K, F) W, see :func:`tokenlearn.losses.attribute_directions`.

    Returns:
        () in [0, 2]; sqrt(2) for unrelated directions.
    """
    means, rows = _centred(class_means), _centred(head_rows.to(class_means))
    distance: Tensor = (rows / rows.norm() - means / means.norm()).norm()
    return distance


def nearest_centre_disagreement(features: Tensor, decisions: Tensor, class_means: Tensor) -> Tensor:
    """NC4, share of images that the classifier does not assign to the class with the nearest mean.

    Args:
        features: (N, F).
        decisions: (N,) class that the classifier assigns.
        class_means: (K, F).

    Returns:
        () in [0, 1].
    """
    nearest = torch.cdist(features.to(class_means), class_means).argmin(dim=1)
    share: Tensor = (nearest != decisions).to(class_means).mean()
    return share


class CollapseStatistics(NamedTuple):
    """Results of :class:`NeuralCollapse`, in float64.

    Attributes:
        class_means: (K, F) mean features of each class.
        global_mean: (F,) mean over all counted images.
        counts: (K,) number of images of each class.
        within_class_variability: () NC1.
        equiangularity: () NC2.
        equinorm: () NC2.
        maximal_angle: () NC2.
        self_duality: () NC3; None without head rows.
        nearest_centre_disagreement: () NC4; None without the classifier's decisions.
    """

    class_means: Tensor
    global_mean: Tensor
    counts: Tensor
    within_class_variability: Tensor
    equiangularity: Tensor
    equinorm: Tensor
    maximal_angle: Tensor
    self_duality: Tensor | None
    nearest_centre_disagreement: Tensor | None

    @property
    def class_directions(self) -> Tensor:
        """(K, F) centred class means ``mu_a = m_a - mu_G``, definition 1 of CASO."""
        return self.class_means - self.global_mean


class NeuralCollapse(Metric):
    """Class means of penultimate features and the measures of neural collapse, for one attribute.

    It takes one pass over any number of images in any number of processes. The state is float64 sums, so the order of
    images affects rounding only. An attribute takes ``8 K F^2`` bytes. With decisions of the classifier the features
    stay too, since NC4 needs the final means: ``4 F`` bytes an image.

    Args:
        num_classes: K.
        num_features: F.
        head_rows: (K, F) the head's rows for these classes, for self-duality.
    """

    full_state_update = False
    feature_sums: Tensor
    counts: Tensor
    second_moments: Tensor
    features: list[Tensor]
    decisions: list[Tensor]
    head_rows: Tensor | None

    def __init__(self, num_classes: int, num_features: int, head_rows: Tensor | None = None) -> None:
        super().__init__()
        double = torch.float64
        self.add_state("feature_sums", torch.zeros(num_classes, num_features, dtype=double), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")
        moments = torch.zeros(num_classes, num_features, num_features, dtype=double)
        self.add_state("second_moments", moments, dist_reduce_fx="sum")
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("decisions", [], dist_reduce_fx="cat")
        self.register_buffer("head_rows", None if head_rows is None else head_rows.detach(), persistent=False)

    def update(self, features: Tensor, labels: Tensor, decisions: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            features: (B, F).
            labels: (B,) class of each image; images with a negative class are not counted.
            decisions: (B,) class that the classifier assigns; of all batches or of none.
        """
        counted = labels >= 0
        if decisions is not None:
            self.features.append(features[counted].float())
            self.decisions.append(decisions[counted])
        features, labels = features[counted].double(), labels[counted]
        self.feature_sums.index_add_(0, labels, features)
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=self.counts.dtype))
        for label in set(labels.tolist()):
            of_class = features[labels == label]
            self.second_moments[label] += of_class.T @ of_class

    def compute(self) -> CollapseStatistics:
        """Means and measures.

        Raises:
            UserError: if a class has no image.
        """
        total = int(self.counts.sum())
        if empty := (self.counts == 0).nonzero().flatten().tolist():
            raise UserError(
                f"no image of class {', '.join(map(str, empty))} among {total}; give more images, or use the "
                "classifier's head instead of class means"
            )
        class_means = self.feature_sums / self.counts[:, None]
        moments = self.second_moments / self.counts[:, None, None]
        within_scatter = moments.mean(dim=0) - class_means.T @ class_means / len(class_means)
        # Gathered from several processes, the lists are tensors.
        features, decisions = (dim_zero_cat(part) if len(part) else None for part in (self.features, self.decisions))
        return CollapseStatistics(
            class_means,
            self.feature_sums.sum(dim=0) / total,
            self.counts.clone(),
            within_class_variability(within_scatter, class_means),
            equiangularity(class_means),
            equinorm(class_means),
            maximal_angle(class_means),
            None if self.head_rows is None else self_duality(class_means, self.head_rows),
            None
            if features is None or decisions is None
            else nearest_centre_disagreement(features, decisions, class_means),
        )
