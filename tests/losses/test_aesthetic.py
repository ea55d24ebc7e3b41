import torch

from tokenlearn.losses import aesthetic_loss

SCORES = torch.tensor([-3.0, 4.0, 12.0])


def test_without_a_target_every_score_is_to_rise():
    scores = SCORES.clone().requires_grad_()
    losses = aesthetic_loss(scores)
    assert losses.tolist() == [3, -4, -12]
    losses.sum().backward()
    assert scores.grad.tolist() == [-1, -1, -1]  # outside of the range of ratings too


def test_with_a_target_scores_are_to_meet_it():
    scores = SCORES.clone().requires_grad_()
    losses = aesthetic_loss(scores, target=10)
    assert losses.tolist() == [13, 6, 2]
    losses.sum().backward()
    assert scores.grad.tolist() == [-1, -1, 1]
