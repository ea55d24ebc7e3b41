import math

import torch

from tokenlearn.metrics import GroupMeans


def test_means_by_hand_and_over_updates():
    metric = GroupMeans(3)
    metric.update(torch.tensor([1.0, 2.0, math.inf]), torch.tensor([0, 2, 2]))
    metric.update(torch.tensor([5.0, math.nan, 4.0]), torch.tensor([0, 0, 2]))
    means = metric.compute()
    assert means[[0, 2]].tolist() == [3.0, 3.0]
    assert means[1].isnan()
