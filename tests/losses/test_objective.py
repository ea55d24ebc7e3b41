import math
import random

import pytest
import torch

from tokenlearn.errors import UserError
from tokenlearn.losses.objective import Crops, Objective, ObjectiveSum, as_objective, random_crops


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Mean(Objective):
    """A loss that tells which part of an image it was given."""

    def loss(self, images, targets=None):
        return images.flatten(1).mean(dim=1)


class Power(Objective):
    """A loss of the targets, which are exponents."""

    uses_targets = True
    score_kind = "share"
    pretrained = "power"

    def loss(self, images, targets=None):
        self.check(targets)
        exponents = torch.tensor([float(target) for target in targets])
        return images.flatten(1).mean(dim=1) ** exponents


def test_weights_multiply(images):
    torch.testing.assert_close(Mean(-2.5)(images), -2.5 * Mean()(images))


def test_crops_are_averaged_and_depend_on_seed_and_step(images):
    objective = Mean(crops=Crops(4, smallest=0.25, seed=7))
    losses = objective(images, 2)
    views = random_crops(images, 4, 0.25, random.Random("7 2"))
    each = torch.stack([view.flatten(1).mean(dim=1) for view in views])
    torch.testing.assert_close(losses, each.mean(dim=0))
    assert (losses > each.min(dim=0).values).all()
    torch.testing.assert_close(objective(images, 2), losses)  # the same in every call
    torch.testing.assert_close(objective(images[1:2], 2), losses[1:2])
    assert not torch.allclose(objective(images, 3), losses)
    assert not torch.allclose(Mean(crops=Crops(4, smallest=0.25, seed=8))(images, 2), losses)
    torch.testing.assert_close(Mean()(images, 2), images.flatten(1).mean(dim=1))


def test_crops_cover_all_sizes_and_places():
    # Each pixel has a value of its own, so a crop's corners tell its place.
    image = torch.arange(20 * 10.0).reshape(1, 1, 20, 10)
    views = random_crops(image, 500, 0.3, random.Random(0))
    assert {view.shape[3] for view in views} == set(range(3, 11))
    assert all(abs(view.shape[2] - 2 * view.shape[3]) <= 1 for view in views)
    corners = [divmod(int(view[0, 0, 0, 0]), 10) for view in views]
    assert {left for _, left in corners} == set(range(8))
    assert max(top for top, _ in corners) >= 13
    assert any(view[0, 0, -1, -1] == 199 for view in views if view.shape[3] < 10)


def test_a_sum_adds_weighted_losses_in_order(images):
    first, second, third = Mean(0.1, Crops(2)), Mean(0.7), Mean(-3.3, Crops(1, seed=5))
    total = first + 8 * second + third
    assert [term.weight for term in total] == [0.1, 8 * 0.7, -3.3]
    expected = sum(term(images, 4) for term in (first, Mean(8 * 0.7), third))
    assert torch.equal(total(images, 4), expected)
    whole = sum(term.weight * term.loss(images) for term in total)
    assert torch.equal(total.loss(images), whole)
    losses, scores = total.loss_and_score(images, step=4)
    assert torch.equal(losses, expected)
    torch.testing.assert_close(scores, -Mean().loss(images))


def test_scaling_shares_the_model_and_leaves_the_objective(images):
    objective = Mean(2.0)
    objective.model = torch.nn.Linear(1, 1)
    scaled = 8 * objective * 0.5
    assert scaled.weight == 8
    assert objective.weight == 2
    assert scaled.model is objective.model
    assert [term.weight for term in (objective + scaled) * 3] == [6, 24]
    for wrong in (lambda: objective * "2", lambda: objective + 1):
        with pytest.raises(TypeError):
            wrong()


def test_a_sum_passes_targets_on(images):
    total = Mean() + 2 * Power()
    mean = Mean().loss(images)
    torch.testing.assert_close(total(images, 0, ["1", "2", "3"]), mean + 2 * mean ** torch.tensor([1, 2, 3]))
    torch.testing.assert_close(total.losses(images, ["1", "3"]), mean[:, None] + 2 * torch.stack([mean, mean**3], 1))
    assert total.uses_targets
    assert not (Mean() + Mean()).uses_targets
    assert list(total.models()) == ["power"]
    total.check(["1"])
    with pytest.raises(UserError, match="Power"):
        total.check()


def test_scores_of_different_kinds_have_no_mean(images):
    alike = Power() + 3 * Power(2.0)
    mean = Mean().loss(images)
    assert (alike.has_score, alike.score_kind) == (True, "share")
    targets = ["1", "2", "2"]
    torch.testing.assert_close(alike.score(images, targets), -(mean ** torch.tensor([1, 2, 2])))
    torch.testing.assert_close(alike.confidence(images, targets), alike.score(images, targets))
    mixed = Mean() + Power()
    assert not mixed.has_score
    for method in (mixed.score, mixed.confidence, mixed.loss_and_score):
        with pytest.raises(UserError, match=r"Mean a score, Power a share.*judge"):
            method(images, targets)
    with pytest.raises(UserError, match=r"weights.*0"):
        (Mean() + Mean(-1)).score(images)


def test_a_list_is_a_sum(images):
    objective = Mean()
    assert as_objective(objective) is objective
    assert torch.equal(as_objective([objective])(images), objective(images))
    nested = ObjectiveSum([objective + objective, objective])
    assert list(nested) == [objective] * 3
    with pytest.raises(UserError, match="objectives is empty"):
        as_objective([])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Crops(0), "crops.number.*1.*0"),
        (lambda: Crops(1, smallest=0.0), "crops.smallest.*0"),
        (lambda: Crops(1, smallest=1.5), "crops.smallest.*1.5"),
        (lambda: Mean(math.inf), "weight of Mean.*inf"),
        (lambda: math.inf * Mean(), "weight of Mean.*inf"),
    ],
)
def test_bad_settings(make, words):
    with pytest.raises(UserError, match=words):
        make()
