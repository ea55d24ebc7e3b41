import pytest
import torch

from tokenlearn.losses import label_preservation


def test_sigmoids_vary_each_on_its_own():
    before = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]])
    after = before.clone()
    after[0, 1], after[1, 0] = 4.0, 9.0
    expected = (torch.sigmoid(torch.tensor(4.0)) - torch.sigmoid(torch.tensor(-1.0))) / 2
    found = label_preservation(after, before, {0}, multi_label=True)
    torch.testing.assert_close(found, torch.tensor([float(expected), 0.0]))


def test_a_softmax_is_renormalised_over_the_preserved_labels():
    before = torch.tensor([[0.6, 0.3, 0.1]]).log()
    assert float(label_preservation(torch.tensor([[9.0, 0.0, 0.0]]), before, {0}, multi_label=False)) == pytest.approx(
        0.25
    )
    same = before + torch.tensor([[5.0, 0.0, 0.0]])
    assert float(label_preservation(same, before, [0], multi_label=False)) == pytest.approx(0, abs=1e-6)


def test_it_is_bounded_and_zero_without_other_labels():
    opposite = torch.tensor([[-1e4, 1e4]])
    assert float(label_preservation(opposite, -opposite, [], multi_label=True)) == 1
    assert float(label_preservation(opposite, -opposite, [], multi_label=False)) == 1
    assert label_preservation(opposite, -opposite, [0, 1], multi_label=True).tolist() == [0]
