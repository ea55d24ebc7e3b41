import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from tokenlearn.metrics import KernelDistances, kernel_distance


def samples(count, shift=0.0, seed=0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + shift


def test_equals_torchmetrics_where_that_takes_all_of_both():
    ours = kernel_distance(samples(20), samples(20, 0.5, 1))
    assert ours.item() == pytest.approx(poly_mmd(samples(20), samples(20, 0.5, 1)).item(), rel=1e-4)


def test_is_unbiased_for_samples_of_different_sizes():
    near = torch.stack([kernel_distance(samples(8, 0, seed), samples(50, 0, 100 + seed)) for seed in range(200)])
    far = torch.stack([kernel_distance(samples(8, 0.5, seed), samples(50, 0, 100 + seed)) for seed in range(200)])
    assert near.mean().abs() < 3 * near.std() / 200**0.5
    assert far.mean() > 10 * near.mean().abs()


def test_groups_are_apart_and_need_two_images():
    reference = samples(30, 0, 9)
    metric = KernelDistances(3, reference)
    assert metric.compute().isnan().all()
    metric.reset()
    metric.update(samples(5), torch.tensor([0, 2, 0, 1, 2]))
    metric.update(samples(3, 1, 1), torch.tensor([0, 0, 2]))
    found = metric.compute()
    group = torch.cat([samples(5)[[0, 2]], samples(3, 1, 1)[:2]])
    assert found[0] == kernel_distance(group, reference)
    assert found[1].isnan()
    assert found[2].isfinite()


def test_images_of_several_processes_count_together():
    reference, features = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    alone = KernelDistances(1, reference)
    alone.update(features.repeat(2, 1), torch.zeros(12, dtype=torch.long))
    one_of_two = KernelDistances(1, reference)
    one_of_two.distributed_available_fn = lambda: True
    one_of_two.dist_sync_fn = lambda state, group: [state, state]
    one_of_two.update(features, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(one_of_two.compute(), alone.compute())
