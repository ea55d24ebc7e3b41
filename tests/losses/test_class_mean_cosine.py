import pytest
import torch

from tokenlearn.losses import class_mean_cosine

DIRECTIONS = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, -1.0]])
CENTRE = torch.tensor([5.0, -7.0])


@pytest.mark.parametrize(
    ("offset", "target", "expected"),
    [([4.0, 0.0], 0, 0.0), ([4.0, 0.0], 1, 1.0), ([-0.1, 0.0], 0, 2.0), ([1.0, 1.0], 1, 1 - 0.5**0.5)],
)
def test_known_angles_from_the_global_mean(offset, target, expected):
    features = (CENTRE + torch.tensor(offset))[None]
    loss = class_mean_cosine(features, torch.tensor([target]), DIRECTIONS, CENTRE)
    torch.testing.assert_close(loss, torch.tensor([expected]), rtol=1e-5, atol=1e-6)


def test_each_sample_has_its_own_class():
    features = CENTRE + torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([2, 0, 1, 0])
    losses = class_mean_cosine(features, targets, DIRECTIONS.double(), CENTRE.double())
    separate = [class_mean_cosine(features[i : i + 1], targets[i : i + 1], DIRECTIONS, CENTRE) for i in range(4)]
    torch.testing.assert_close(losses, torch.cat(separate))


def test_no_saturation_far_along_the_direction():
    features = (CENTRE + torch.tensor([1000.0, 300.0]))[None].requires_grad_()
    class_mean_cosine(features, torch.tensor([0]), DIRECTIONS, CENTRE).sum().backward()
    tangent = torch.tensor([-300.0, 1000.0]) / 1000**2
    assert features.grad is not None
    cosine = torch.nn.functional.cosine_similarity(features.grad[0], tangent, dim=0)
    torch.testing.assert_close(cosine, torch.tensor(1.0))  # straight to the direction's ray
    assert features.grad.norm() * 1000 > 0.2  # relative to the features' length
