import pytest
import torch

from tokenlearn.metrics import ScaleRanks


def test_ranks_of_the_side_that_is_needed_and_of_both():
    ranks = ScaleRanks(2)
    scales = torch.tensor([[-2.0, -1, 0, 1, 2]]).expand(2, 5)
    # Rising where it is needed, and falling or level elsewhere.
    logits = torch.tensor([[2.0, 1, 0, 1, 2], [-2.0, -1, 0, -1, -2]])
    ranks.update(logits, scales, torch.tensor([False, True]), 1)
    found = ranks.compute()
    assert found["rank_correlation"][1] == pytest.approx(1, abs=1e-4)
    assert found["both_sides_rank_correlation"][1] == pytest.approx(0, abs=1e-4)
    assert all(values.shape == (2,) and values[0].isnan() for values in found.values())


def test_a_side_of_one_scale_does_not_count_and_one_group_keeps_its_dimension():
    ranks = ScaleRanks(1)
    ranks.update(torch.tensor([[3.0, 1.0]]), torch.tensor([[-1.0, 1.0]]), torch.tensor([False]), 0)
    found = ranks.compute()
    assert found["rank_correlation"].isnan().tolist() == [True]
    assert found["both_sides_rank_correlation"].tolist() == [pytest.approx(-1, abs=1e-4)]
