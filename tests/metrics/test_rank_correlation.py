import pytest
import torch

from tokenlearn.metrics import rank_correlation


def test_ranks_of_the_side_that_an_image_needs_and_of_both():
    scales = torch.tensor([[-2.0, -1, 0, 1, 2]]).expand(2, 5)
    # Rising on the needed side, and falling or level elsewhere.
    logits = torch.tensor([[2.0, 1, 0, 1, 2], [-2.0, -1, 0, -1, -2]])
    found = rank_correlation(logits, scales, torch.tensor([False, True]))
    assert found.needed.tolist() == pytest.approx([1, 1], abs=1e-4)
    assert found.both_sides.tolist() == pytest.approx([0, 0], abs=1e-4)


def test_a_side_of_one_scale_has_no_rank():
    found = rank_correlation(torch.tensor([[3.0, 1.0]]), torch.tensor([[-1.0, 1.0]]), torch.tensor([False]))
    assert found.needed.isnan().tolist() == [True]
    assert found.both_sides.tolist() == pytest.approx([-1], abs=1e-4)
