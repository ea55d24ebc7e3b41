"""The objective of CASO (Chang et al., IJCAI 2025, https://arxiv.org/abs/2505.14254).

For an image with latents ``z_0`` and a class a of one of its attributes, CASO learns the token vectors ``e_a`` that
minimise

    L(e_a) = L_edit(h, a) + lambda L_rec(z, z_0) + mu L_pres(F, F')

where ``z`` is the edit of the image by the token, and a frozen classifier sees the decoded edit:

    z_t = alpha_t z_0 + sigma_t eps                         noised latents
    eps_s = eps(z_t) + s (eps(z_t, e_a) - eps(z_t))         guided noise prediction, scale s
    z = (z_t - sigma_t eps_s) / alpha_t                     one-step edit, in latent space
    h, F = W h + b                                          penultimate features and logits of the decoded edit

    L_edit = -log softmax_a(F)                              editing loss, ``cross_entropy``
           = (1 - softmax_a(F))^2                           as released (trainer.py), ``probability_error``
           = 1 - cos(h - mu_G, mu_a)                        ``class_mean``, with definition 1 of the paper:
                                                            mu_a = m_a - mu_G, class mean minus global mean
    L_rec  = mean (z - z_0)^2                               reconstruction loss
    L_pres = TV(F, F')                                      preservation loss, not in the paper: F' are the logits
                                                            without the token

``softmax_a(F)`` is the probability of the class within its attribute, see
:func:`tokenlearn.losses.attribute_logits`. By theorem 1 of the paper (self-duality of a collapsed classifier; Papyan,
Han and Donoho, 2020, https://arxiv.org/abs/2008.08186), the head's rows ``w_a`` point along ``mu_a``, so the editing
loss drives the features along ``mu_a`` (proposition 2). The released code has ``lambda = 0``.

:class:`CasoObjective` holds the settings and evaluates the equation for a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor
from torch.nn import functional

from tokenlearn.errors import check_at_least
from tokenlearn.losses.attribute_logits import AttributeClass, attribute_logits
from tokenlearn.losses.class_cross_entropy import class_cross_entropy

EditingLoss = Literal["cross_entropy", "probability_error", "class_mean"]
"""Forms of the editing loss."""


@dataclass(frozen=True, eq=False)
class AttributeInClassifier:
    """An attribute as the classifier sees it.

    Attributes:
        classes: the K classes as outputs of the classifier, see :func:`tokenlearn.losses.attribute_logits`.
        multi_label: whether the outputs are independent sigmoids instead of one softmax.
        class_directions: (K, F) ``mu_a``, or substitutes for them; their lengths do not matter.
        global_mean: (F,) ``mu_G``.
    """

    classes: Sequence[AttributeClass]
    multi_label: bool
    class_directions: Tensor
    global_mean: Tensor


@dataclass(frozen=True, eq=False)
class EditedImages:
    """B edited images, everything that the objective depends on.

    Attributes:
        attributes: B indices of the attributes that were edited.
        targets: (B,) class a of each attribute, int64.
        present: (B,) bool, whether the image shows the class before the edit.
        latents: (B, C, h, w) latents ``z_0`` of the images.
        edited: (B, C, h, w) latents ``z`` of the edits.
        features: (B, F) features ``h`` of the edits.
        logits: (B, num_outputs) logits ``F`` of the edits.
        compared: n rows of the batch for the preservation loss, see :meth:`CasoObjective.compared_rows`.
        unedited_logits: (n, num_outputs) logits ``F'`` of these rows; None where n is 0.
    """

    attributes: Sequence[int]
    targets: Tensor
    present: Tensor
    latents: Tensor
    edited: Tensor
    features: Tensor
    logits: Tensor
    compared: Sequence[int] = ()
    unedited_logits: Tensor | None = None


class CasoTerms(NamedTuple):
    """The objective and its terms.

    Attributes:
        loss: () mean over the batch of the weighted terms.
        editing: (B,) ``L_edit``.
        reconstruction: (B,) ``L_rec``, without its weight.
        preservation: (B,) ``L_pres``, without its weight; None if its weight is 0.
    """

    loss: Tensor
    editing: Tensor
    reconstruction: Tensor
    preservation: Tensor | None


@dataclass(frozen=True)
class CasoObjective:
    """The objective of CASO, see the equation at the top of this module.

    Attributes:
        editing: form of the editing loss ``L_edit``.
        reconstruction_weight: ``lambda``; 0 in the released code.
        preservation_weight: ``mu``; 0 in the paper.
        preservation_every: apply the preservation loss to every n-th image, n times as strongly; larger is cheaper.
        reconstruct_present_only: apply the reconstruction loss only to images that show the class already. The others
            have to change.
        skip_present: do not apply the editing loss to images that show the class already.

    Raises:
        UserError: if a weight is negative or ``preservation_every`` is below 1.
    """

    editing: EditingLoss = "cross_entropy"
    reconstruction_weight: float = 0.1
    preservation_weight: float = 0.0
    preservation_every: int = 1
    reconstruct_present_only: bool = False
    skip_present: bool = False

    def __post_init__(self) -> None:
        check_at_least(
            "objective",
            0,
            reconstruction_weight=self.reconstruction_weight,
            preservation_weight=self.preservation_weight,
        )
        check_at_least("objective", 1, preservation_every=self.preservation_every)

    @property
    def uses_present(self) -> bool:
        """Whether the loss depends on what images show before the edit."""
        return self.skip_present or self.reconstruct_present_only

    def compared_rows(self, positions: Sequence[int]) -> list[int]:
        """Rows of a batch that the preservation loss applies to.

        Args:
            positions: position of each row in the training.
        """
        if not self.preservation_weight:
            return []
        return [row for row, position in enumerate(positions) if position % self.preservation_every == 0]

    def __call__(self, images: EditedImages, attributes: Sequence[AttributeInClassifier]) -> CasoTerms:
        """The objective for a batch.

        Args:
            images: edited images.
            attributes: all attributes, which ``images.attributes`` are indices of.
        """
        editing = images.latents.new_zeros(len(images.latents), dtype=images.logits.dtype)
        for index in dict.fromkeys(images.attributes):
            rows = [row for row, attribute in enumerate(images.attributes) if attribute == index]
            editing[rows] = editing_loss(
                self.editing, images.features[rows], images.logits[rows], images.targets[rows], attributes[index]
            )
        if self.skip_present:
            editing = editing * ~images.present
        reconstruction = latent_reconstruction(
            images.edited, images.latents, images.present if self.reconstruct_present_only else None
        )
        losses = editing + self.reconstruction_weight * reconstruction
        preservation = None
        if self.preservation_weight:
            preservation = self._preservation(images, attributes)
            losses = losses + self.preservation_weight * preservation
        return CasoTerms(losses.mean(), editing, reconstruction, preservation)

    def _preservation(self, images: EditedImages, attributes: Sequence[AttributeInClassifier]) -> Tensor:
        """``L_pres`` (B,), 0 for rows that are not compared; the others count for these too."""
        losses = images.logits.new_zeros(len(images.logits))
        if images.unedited_logits is not None:
            for row, unedited in zip(images.compared, images.unedited_logits, strict=True):
                attribute = attributes[images.attributes[row]]
                edited = {output for output, _ in attribute.classes}
                loss = label_preservation(images.logits[row, None], unedited[None], edited, attribute.multi_label)
                losses[row] = self.preservation_every * loss[0]
        return losses


def editing_loss(
    form: EditingLoss, features: Tensor, logits: Tensor, targets: Tensor, attribute: AttributeInClassifier
) -> Tensor:
    """``L_edit``, per sample.

    Args:
        form: form of the loss.
        features: (B, F) features of the edits.
        logits: (B, num_outputs) logits of the edits.
        targets: (B,) classes of the attribute, int64.
        attribute: the attribute that is edited.

    Returns:
        (B,) losses, not reduced.
    """
    if form == "class_mean":
        return class_mean_cosine(features, targets, attribute.class_directions, attribute.global_mean)
    class_logits = attribute_logits(logits, attribute.classes, attribute.multi_label)
    if form == "probability_error":
        return probability_error(class_logits, targets)
    return class_cross_entropy(class_logits, targets)


def probability_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Editing loss of the released code: squared distance of the target class's probability from 1, per sample.

    ``(1 - p_target)^2`` with p the softmax of the logits. For the two classes of a binary attribute, with logits
    ``[l, 0]`` (see :func:`tokenlearn.losses.attribute_logits`), it equals the released ``(a - sigmoid(l))^2`` with
    ``a`` = 1 for the first class and 0 for the second. Its gradient vanishes where the classifier is confident, even
    of the wrong class; the gradient of :func:`tokenlearn.losses.class_cross_entropy` does not.

    Args:
        logits: (B, K) classifier outputs before softmax.
        targets: (B,) indices of the target classes, int64.

    Returns:
        (B,) losses in [0, 1], not reduced.
    """
    return (1 - logits.softmax(dim=1).gather(1, targets[:, None]).squeeze(1)).square()


def class_mean_cosine(features: Tensor, targets: Tensor, class_directions: Tensor, global_mean: Tensor) -> Tensor:
    """One minus the cosine between centred features and the target class's direction, per sample.

    ``1 - cos(h - mu_G, mu_a)`` with ``mu_a = m_a - mu_G`` the centred mean of the class, definition 1 of CASO. Unlike
    probabilities, the cosine does not saturate: it ranks two images that are both classified with certainty.

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


def latent_reconstruction(edited: Tensor, latents: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error between the latents of the edit and of the image, per sample: the reconstruction loss.

    An image without the target class has to change, so a weight can be 1 for images that already show the class and 0
    for the others.

    Args:
        edited: (B, C, h, w) latents of the edits.
        latents: (B, C, h, w) latents of the images.
        weights: (B,) bool or factor of each sample; None for 1.

    Returns:
        (B,) losses, not reduced; a mean over the batch includes samples of weight 0.
    """
    errors = (edited - latents).square().flatten(1).mean(dim=1)
    return errors if weights is None else errors * weights


def label_preservation(logits: Tensor, reference: Tensor, edited: Collection[int], multi_label: bool) -> Tensor:
    """Total variation distance between a classifier's other labels with and without an edit, per sample.

    Unlike a cross-entropy it is bounded, so an edit can still reach a class that excludes another label, such as bald
    and curls. It is not part of the paper, whose reconstruction loss does not separate correlated attributes such as
    beard and man.

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
