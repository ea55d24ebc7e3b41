import torch

from tokenlearn.metrics import perceptual_distance


def test_by_hand():
    features = torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[1.0, 1.0], [4.0, 0.0]]])
    others = torch.tensor([[[0.0, 5.0], [0.0, 1.0]], [[2.0, 2.0], [-1.0, 0.0]]])
    # At right angles the squared distance is 2, opposite it is 4, and lengths do not count.
    torch.testing.assert_close(perceptual_distance(features, others), torch.tensor([1.0, 2.0]))
    assert perceptual_distance(features, 3 * features).abs().max() < 1e-6
