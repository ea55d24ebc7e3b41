import torch

from tokenlearn.metrics.group_scores import GroupScores


def test_sums_and_counts_by_group():
    metric = GroupScores(3)
    metric.update(torch.tensor([0.5, -1.0]), torch.tensor([2, 0]))
    metric.update(torch.tensor([1.5]), torch.tensor([2]))
    assert metric.compute().tolist() == [[-1.0, 1.0], [0.0, 0.0], [2.0, 2.0]]
    metric.reset()
    assert not metric.compute().any()
