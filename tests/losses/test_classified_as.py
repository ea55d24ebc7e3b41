import torch

from tokenlearn.losses import is_classified_as


def test_is_classified_as():
    logits = torch.tensor([[2.0, 1.0, -1.0], [-3.0, -2.0, -1.0], [2.0, 3.0, 1.0]])
    targets = torch.tensor([1, 2, 1])
    assert is_classified_as(logits, targets, multi_label=False).tolist() == [False, True, True]
    assert is_classified_as(logits, targets, multi_label=True).tolist() == [True, False, True]
