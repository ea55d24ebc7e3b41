import torch

from tokenlearn.metrics import GroupFeatures


def test_features_are_gathered_by_group():
    metric = GroupFeatures(3)
    assert metric.compute() == []
    metric.reset()
    metric.update(torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([2, 0]))
    metric.update(torch.tensor([[5.0, 6]]), torch.tensor([2]))
    assert [part.tolist() for part in metric.compute()] == [[[3, 4]], [], [[1, 2], [5, 6]]]
