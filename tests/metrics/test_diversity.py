import math

import pytest
import torch

from tokenlearn.metrics import coverage, covered, expected_coverage, pairwise_distance, relative_diversity


def normal(count, width=4, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_the_mean_over_pairs():
    triangle = torch.tensor([[0.0, 0], [3, 0], [0, 4]])
    assert pairwise_distance(triangle).item() == pytest.approx((3 + 4 + 5) / 3)
    assert pairwise_distance(triangle + 1e4).item() == pytest.approx(4)
    assert pairwise_distance(triangle[:1]).isnan()


def test_diversity_is_relative_to_real_images():
    images = normal(30)
    assert relative_diversity(0.5 * images + 7, images).item() == pytest.approx(0.5)
    assert relative_diversity(images[:1].expand(5, -1), images) == 0
    # Two points of a normal distribution in one dimension are 2 / sqrt(pi) apart on average.
    assert pairwise_distance(normal(2000, 1)).item() == pytest.approx(2 / math.sqrt(math.pi), rel=0.03)


def test_balls_reach_to_the_nth_neighbour():
    reference = torch.tensor([[0.0], [1], [3], [6]])  # radii for one neighbour: 1, 1, 2, 3
    for image, number in ((0.5, 2), (1.9, 2), (4.9, 2), (4.99, 2), (9.0, 1), (9.01, 0), (-1.0, 1), (100, 0)):
        assert coverage(torch.tensor([[image]]), reference, 1).item() * 4 == pytest.approx(number), image
    assert coverage(reference, reference, 1) == 1
    # For two neighbours: 3, 2, 3, 5
    assert coverage(torch.tensor([[-2.5]]), reference, 2).item() == 0.25
    assert covered(torch.tensor([[4.9]]), reference, 1).tolist() == [False, False, True, True]


@pytest.mark.parametrize(("images", "real"), [(60, 60), (24, 90)])
def test_coverage_of_the_same_distribution_is_as_published(images, real):
    found = [coverage(normal(images, seed=seed), normal(real, seed=1000 + seed)).item() for seed in range(100)]
    assert sum(found) / len(found) == pytest.approx(expected_coverage(images, real), abs=0.015)
    collapsed = normal(1).expand(images, -1)
    assert coverage(collapsed, normal(real, seed=1)) < 0.3


@pytest.mark.parametrize(("images", "real", "k"), [(4, 5, 5), (4, 5, 0), (0, 5, 2)])
def test_too_few_images_are_refused(images, real, k):
    with pytest.raises(ValueError, match=f"{k} neighbours of {images} images by {real}"):
        coverage(normal(images), normal(real), k)
