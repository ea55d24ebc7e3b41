"""Logits and feature directions of an attribute's classes, from the outputs of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokenlearn.errors import UserError

AttributeClass = tuple[int, bool]
"""A class of an attribute: an output of the classifier, which is present (True) or absent (False)."""


def attribute_logits(logits: Tensor, classes: Sequence[AttributeClass], multi_label: bool) -> Tensor:
    """Logits of an attribute's classes. Their softmax gives the probabilities of the classes.

    The logit of a present class is the classifier's logit of its output. The logit of the absent class is:

    - 0 for independent sigmoids, because ``softmax([l, 0]) = [sigmoid(l), sigmoid(-l)]``. With several present
      classes, the softmax is the joint distribution of the sigmoids under the condition that at most one class holds
      (exactly one if no class is absent), since odds multiply: ``p_k ~ exp(l_k)``, ``p_absent ~ 1``.
    - ``log sum_{i != j} exp(l_i)`` over all other outputs for one softmax, because
      ``softmax([l_j, log sum_{i != j} exp(l_i)]) = [p_j, 1 - p_j]``.

    Args:
        logits: (B, num_outputs) classifier outputs before softmax or sigmoid.
        classes: the K >= 2 classes as (output, present). At most one may be absent, and a present class must have the
            same output: ``[(3, True), (3, False)]`` is output 3 and its absence.
        multi_label: whether the outputs are independent sigmoids instead of one softmax.

    Returns:
        (B, K) logits in the order of ``classes``.

    Raises:
        UserError: if the classes do not follow these rules, or an output does not exist.
    """
    return _class_rows(logits.T, classes, multi_label, lambda others: others.logsumexp(dim=0)).T


def attribute_directions(head_weight: Tensor, classes: Sequence[AttributeClass], multi_label: bool) -> Tensor:
    """Directions of an attribute's classes in feature space, from the weight of a classifier's last layer.

    They replace centred class means if there is no data: in a collapsed classifier the two agree up to a factor
    (self-duality; Papyan, Han and Donoho, 2020, https://arxiv.org/abs/2008.08186). A present class takes the weight
    row of its output. The absent class takes 0 for independent sigmoids, and the mean of all other rows for one
    softmax. The rows are then centred, which leaves every softmax unchanged: a sigmoid with row w gives ``w / 2`` and
    ``-w / 2``.

    Args:
        head_weight: (num_outputs, F) weight of the last layer.
        classes: see :func:`attribute_logits`.
        multi_label: whether the outputs are independent sigmoids instead of one softmax.

    Returns:
        (K, F) rows; their sum is zero.

    Raises:
        UserError: see :func:`attribute_logits`.
    """
    rows = _class_rows(head_weight, classes, multi_label, lambda others: others.mean(dim=0))
    return rows - rows.mean(dim=0)


def _class_rows(
    outputs: Tensor, classes: Sequence[AttributeClass], multi_label: bool, summary: Callable[[Tensor], Tensor]
) -> Tensor:
    """Rows (K, ...) of ``outputs`` (num_outputs, ...) for the classes; ``summary`` merges several rows into one."""
    present = {output for output, is_present in classes if is_present}
    absent = [output for output, is_present in classes if not is_present]
    others = [output for output in range(len(outputs)) if output not in present]
    if len(classes) < 2 or len(present) + len(absent) < len(classes):
        raise UserError(f"an attribute needs at least two classes, all different, got {list(classes)}")
    if len(absent) > 1 or not present.issuperset(absent):
        raise UserError(
            f"an attribute can have one absent class, whose output is also a present class, got {list(classes)}"
        )
    if not present <= set(range(len(outputs))):
        raise UserError(
            f"the classifier has outputs 0 to {len(outputs) - 1}, the attribute needs outputs {sorted(present)}; name "
            "classes of this classifier"
        )
    if absent and not multi_label and not others:
        raise UserError(
            f"the classes use all {len(outputs)} outputs of the classifier, so nothing is left for the absent class; "
            "remove it"
        )
    rest = torch.zeros_like(outputs[0]) if multi_label or not absent else summary(outputs[others])
    return torch.stack([outputs[output] if is_present else rest for output, is_present in classes])
