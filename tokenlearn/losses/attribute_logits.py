"""The classes of an attribute, out of everything that a classifier knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokenlearn.errors import UserError

AttributeClass = tuple[int, bool]
"""A class of an attribute: output of the classifier, and whether it is present (True) or absent (False)."""


def attribute_logits(logits: Tensor, classes: Sequence[AttributeClass], multi_label: bool) -> Tensor:
    """Logits of an attribute's classes, whose softmax are the probabilities of these classes.

    A present class has the classifier's own logit, so attributes whose classes are all outputs are merely gathered. An
    absent class has the logit of none of the present ones:

    - of independent sigmoids it is 0, because ``softmax([l, 0]) = [sigmoid(l), sigmoid(-l)]``. With several present
      classes, the softmax is what the sigmoids say given that at most one of them holds (exactly one, where no class
      is absent), as odds multiply: ``p_k ~ exp(l_k)``, ``p_absent ~ 1``.
    - of one softmax it is the logarithm of the summed exponentials of all other outputs, because
      ``softmax([l_j, log sum_{i != j} exp(l_i)]) = [p_j, 1 - p_j]``.

    Args:
        logits: (B, num_outputs) classifier outputs before softmax or sigmoid.
        classes: the K >= 2 classes as (output, present); at most one may be absent, and its output must be that of a
            present one: ``[(3, True), (3, False)]`` is output 3 against its absence.
        multi_label: whether the outputs are independent sigmoids instead of one softmax.

    Returns:
        (B, K) logits in the order of ``classes``.

    Raises:
        UserError: if the classes are no alternatives as described, or there is no such output.
    """
    return _class_rows(logits.T, classes, multi_label, lambda others: others.logsumexp(dim=0)).T


def attribute_directions(head_weight: Tensor, classes: Sequence[AttributeClass], multi_label: bool) -> Tensor:
    """Directions in feature space that a classifier's head takes for an attribute's classes.

    They stand in for centred class means where there are no data: in a collapsed classifier both agree up to a factor
    (self-duality; Papyan, Han and Donoho, 2020, https://arxiv.org/abs/2008.08186). The row of a present class is that
    of its output; the row of an absent one is 0 for independent sigmoids, and the mean of all other outputs' rows for
    one softmax. All are then centred, which no softmax notices: a sigmoid's row w gives ``w / 2`` and ``-w / 2``.

    Args:
        head_weight: (num_outputs, F) weight of the last layer.
        classes: see :func:`attribute_logits`.
        multi_label: whether the outputs are independent sigmoids instead of one softmax.

    Returns:
        (K, F) rows whose sum is zero.

    Raises:
        UserError: see :func:`attribute_logits`.
    """
    rows = _class_rows(head_weight, classes, multi_label, lambda others: others.mean(dim=0))
    return rows - rows.mean(dim=0)


def _class_rows(
    outputs: Tensor, classes: Sequence[AttributeClass], multi_label: bool, summary: Callable[[Tensor], Tensor]
) -> Tensor:
    """Rows (K, ...) of ``outputs`` (num_outputs, ...) for each class; ``summary`` is one of several rows together."""
    present = {output for output, is_present in classes if is_present}
    absent = [output for output, is_present in classes if not is_present]
    others = [output for output in range(len(outputs)) if output not in present]
    if len(classes) < 2 or len(present) + len(absent) < len(classes):
        raise UserError(f"an attribute needs at least two classes, all different, got {list(classes)}")
    if len(absent) > 1 or not present.issuperset(absent):
        raise UserError(f"an attribute can have one absent class, of an output that is another, got {list(classes)}")
    if not present <= set(range(len(outputs))):
        raise UserError(
            f"the classifier has outputs 0 to {len(outputs) - 1}, the attribute asks for {sorted(present)}"
        )
    if absent and not multi_label and not others:
        raise UserError("the classes are all outputs of the classifier, which leaves no absent class; leave it out")
    rest = torch.zeros_like(outputs[0]) if multi_label or not absent else summary(outputs[others])
    return torch.stack([outputs[output] if is_present else rest for output, is_present in classes])
