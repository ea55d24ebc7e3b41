import math

import pytest
import torch
from torch.nn import functional

from tokenlearn.losses import mean_direction, spherical_distance


def unit_vectors(count, dim=5, seed=0):
    return functional.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("degrees", [0, 1, 60, 90, 179])
def test_is_half_of_the_squared_angle(degrees):
    angle = math.radians(degrees)
    features = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    loss = spherical_distance(features, torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(loss, torch.tensor([angle**2 / 2], dtype=torch.float64))


def test_equals_the_published_formula():
    u, v = unit_vectors(6), unit_vectors(6, seed=1)
    torch.testing.assert_close(spherical_distance(u, v), 2 * torch.arcsin((u - v).norm(dim=1) / 2) ** 2)


def test_one_target_serves_the_batch():
    features, targets = unit_vectors(3), unit_vectors(1, seed=1)
    torch.testing.assert_close(spherical_distance(features, targets[0]), spherical_distance(features, targets))


@pytest.mark.parametrize("sign", [1, -1])
def test_gradient_is_finite_at_the_target_and_opposite_to_it(sign):
    target = unit_vectors(1)[0]
    features = (sign * target * torch.tensor([[1.0], [1 + 1e-7], [1 - 1e-7]])).requires_grad_()
    losses = spherical_distance(features, target)
    torch.testing.assert_close(losses, torch.full((3,), 0.0 if sign > 0 else math.pi**2 / 2), atol=4e-3, rtol=0)
    losses.sum().backward()
    assert features.grad.isfinite().all()
    assert features.grad[0].abs().max() == 0


def test_gradient_agrees_with_finite_differences():
    features = unit_vectors(3).double().requires_grad_()
    target = unit_vectors(1, seed=1)[0].double()
    assert torch.autograd.gradcheck(lambda features: spherical_distance(features, target), features)


def test_mean_direction_is_the_nearest_to_all_targets():
    targets = functional.normalize(unit_vectors(4) + 1, dim=-1)
    mean = mean_direction(targets)
    torch.testing.assert_close(mean.norm(), torch.tensor(1.0))
    others = unit_vectors(1000, seed=2)
    assert (targets @ mean).mean() > (others @ targets.T).mean(dim=1).max()
    torch.testing.assert_close(mean_direction(targets[:1]), targets[0])
    torch.testing.assert_close(mean_direction(targets.reshape(2, 2, 5))[1], mean_direction(targets[2:]))
