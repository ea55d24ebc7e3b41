from itertools import product

import pytest
import torch

from tokenlearn.errors import UserError
from tokenlearn.losses import attribute_directions, attribute_logits

LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_present_against_absent_is_the_sigmoid():
    probabilities = attribute_logits(LOGITS, [(3, True), (3, False)], multi_label=True).softmax(1)
    torch.testing.assert_close(probabilities[:, 0], LOGITS[:, 3].sigmoid())
    swapped = attribute_logits(LOGITS, [(3, False), (3, True)], multi_label=True).softmax(1)
    torch.testing.assert_close(swapped, probabilities.flip(1))


def test_classes_that_are_all_outputs_are_gathered():
    classes = [(4, True), (0, True), (2, True)]
    for multi_label in (False, True):
        assert torch.equal(attribute_logits(LOGITS, classes, multi_label), LOGITS[:, [4, 0, 2]])


@pytest.mark.parametrize("absent", [False, True])
def test_several_sigmoids_given_that_at_most_one_holds(absent):
    outputs = [0, 2, 3]
    classes = [(output, True) for output in outputs] + ([(2, False)] if absent else [])
    chances = LOGITS[:, outputs].sigmoid()
    joint = {
        state: torch.stack([chances[:, i] if on else 1 - chances[:, i] for i, on in enumerate(state)]).prod(0)
        for state in product([False, True], repeat=3)
        if sum(state) == 1 or (absent and sum(state) == 0)
    }
    order = [(True, False, False), (False, True, False), (False, False, True)] + [(False,) * 3] * absent
    expected = torch.stack([joint[state] for state in order], dim=1) / sum(joint.values())[:, None]
    torch.testing.assert_close(attribute_logits(LOGITS, classes, multi_label=True).softmax(1), expected)


def test_absent_of_a_softmax_is_all_other_outputs():
    probabilities = attribute_logits(LOGITS, [(1, True), (4, True), (1, False)], multi_label=False).softmax(1)
    torch.testing.assert_close(probabilities[:, :2], LOGITS.softmax(1)[:, [1, 4]])


def test_directions_are_the_centred_rows_of_the_class_logits():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(
        attribute_directions(weight, [(3, True), (3, False)], multi_label=True),
        torch.stack([weight[3], -weight[3]]) / 2,
    )
    rows = attribute_directions(weight, [(0, True), (1, True), (4, True)], multi_label=False)
    torch.testing.assert_close(rows, weight[[0, 1, 4]] - weight[[0, 1, 4]].mean(0))
    rows = attribute_directions(weight, [(0, True), (0, False)], multi_label=False)
    torch.testing.assert_close(rows[0] - rows[1], weight[0] - weight[1:].mean(0))
    # The same as logits say of features, up to what is common to all classes.
    features = torch.randn(4, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    classes = [(0, True), (2, True), (2, False)]
    logits = attribute_logits(features @ weight.T, classes, multi_label=True)
    projected = features @ attribute_directions(weight, classes, multi_label=True).T
    torch.testing.assert_close(projected.softmax(1), logits.softmax(1))


@pytest.mark.parametrize(
    ("classes", "multi_label", "message"),
    [
        ([(0, True)], True, r"two classes.*\(0, True\)"),
        ([(0, True), (0, True)], True, r"different.*\(0, True\)"),
        ([(0, True), (1, False)], True, "one absent class"),
        ([(0, True), (1, True), (0, False), (1, False)], True, "one absent class"),
        ([(0, True), (5, True)], True, "outputs 0 to 4"),
        ([(-1, True), (0, True)], False, "outputs 0 to 4"),
        ([*((output, True) for output in range(5)), (0, False)], False, "all 5 outputs"),
    ],
)
def test_refusals(classes, multi_label, message):
    for function in (attribute_logits, attribute_directions):
        with pytest.raises(UserError, match=message):
            function(LOGITS if function is attribute_logits else LOGITS.T, classes, multi_label)
