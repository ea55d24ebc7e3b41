import pytest
import torch

from tokenlearn.errors import UserError
from tokenlearn.metrics import (
    NeuralCollapse,
    equiangularity,
    equinorm,
    maximal_angle,
    nearest_centre_disagreement,
    self_duality,
    within_class_variability,
)

CLASSES, WIDTH = 5, 8


def simplex() -> torch.Tensor:
    """(CLASSES, WIDTH) vertices of a simplex, rotated and shifted."""
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
    corners = torch.eye(CLASSES, WIDTH, dtype=torch.float64)
    return (corners - corners.mean(0)) @ rotation + torch.randn(WIDTH, generator=generator, dtype=torch.float64)


def random_features(count: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Features about random class means, of classes that are not equally common."""
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(CLASSES, WIDTH, generator=generator) + 10
    labels = torch.multinomial(torch.arange(1.0, CLASSES + 1), count, replacement=True, generator=generator)
    return means[labels] + 0.3 * torch.randn(count, WIDTH, generator=generator), labels


def test_a_collapsed_classifier_has_zero_of_everything():
    means = simplex()
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor([3, 1, 2, 7, 1]))
    metric = NeuralCollapse(CLASSES, WIDTH, head_rows=3 * means + 1)
    metric.update(means[labels], labels, labels)
    found = metric.compute()
    assert found.nearest_centre_disagreement == 0
    zero = torch.zeros((), dtype=torch.float64)
    for measure in (
        found.within_class_variability,
        found.equiangularity,
        found.equinorm,
        found.maximal_angle,
        found.self_duality,
    ):
        torch.testing.assert_close(measure, zero, rtol=0.0, atol=1e-7)
    torch.testing.assert_close(found.class_means, means)


def test_statistics_equal_two_passes_over_the_data():
    features, labels = random_features()
    metric = NeuralCollapse(CLASSES, WIDTH)
    for rows in torch.arange(len(labels)).split(64):
        metric.update(features[rows], labels[rows])
    found = metric.compute()
    features = features.double()
    by_class = [features[labels == label] for label in range(CLASSES)]
    means = torch.stack([rows.mean(0) for rows in by_class])
    torch.testing.assert_close(found.class_means, means)
    torch.testing.assert_close(found.global_mean, features.mean(0))
    torch.testing.assert_close(found.class_directions, means - features.mean(0))
    assert found.counts.tolist() == labels.bincount().tolist()
    assert found.self_duality is None
    assert found.nearest_centre_disagreement is None

    within = sum((rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows) for rows in by_class) / CLASSES
    centred = means - means.mean(0)
    between = centred.T @ centred / CLASSES
    expected = torch.trace(within @ torch.linalg.pinv(between, rtol=1e-10, hermitian=True)) / CLASSES
    torch.testing.assert_close(found.within_class_variability, expected)
    assert expected > 0.01
    cosines = torch.tensor([
        torch.nn.functional.cosine_similarity(centred[i], centred[j], dim=0)
        for i in range(CLASSES)
        for j in range(i)
    ])  # fmt: skip
    torch.testing.assert_close(found.equiangularity, cosines.std(correction=0))
    torch.testing.assert_close(found.maximal_angle, (cosines + 1 / (CLASSES - 1)).abs().mean())
    norms = centred.norm(dim=1)
    torch.testing.assert_close(found.equinorm, norms.std(correction=0) / norms.mean())
    assert min(found.equiangularity, found.equinorm) > 0.01


def test_within_class_variability_of_two_classes():
    # Means at +-m along the first axis and variance v on every axis: Sigma_B = m^2, so v / m^2 / 2.
    means = torch.tensor([[3.0, 1.0], [-3.0, 1.0]])
    torch.testing.assert_close(within_class_variability(0.9 * torch.eye(2), means), torch.tensor(0.05))


def test_two_classes_are_trivially_equiangular_and_equinormal():
    means = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for measure in (equiangularity(means), equinorm(means), maximal_angle(means)):
        torch.testing.assert_close(measure, torch.zeros((), dtype=torch.float64))


def test_self_duality_is_a_distance_of_directions():
    means = simplex()
    torch.testing.assert_close(self_duality(means, -2 * means), torch.tensor(2.0, dtype=torch.float64))
    centred = means - means.mean(0)
    _, _, rows = torch.linalg.svd(centred)
    orthogonal = torch.eye(CLASSES, dtype=torch.float64)[:, :1] @ rows[-1:]  # off the span of the means
    torch.testing.assert_close(self_duality(means, orthogonal), torch.tensor(2.0, dtype=torch.float64).sqrt())


def test_merged_parts_equal_one_pass():
    features, labels = random_features()
    head = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(2))
    whole = NeuralCollapse(CLASSES, WIDTH, head)
    decisions = labels.roll(1)
    whole.update(features, labels, decisions)
    parts = [NeuralCollapse(CLASSES, WIDTH, head) for _ in range(2)]
    parts[0].update(features[:100], labels[:100], decisions[:100])
    parts[1].update(features[100:], labels[100:], decisions[100:])
    parts[0].merge_state(parts[1])
    for merged, one in zip(parts[0].compute(), whole.compute(), strict=True):
        torch.testing.assert_close(merged, one)


def test_images_of_no_class_do_not_count():
    features, labels = random_features()
    metric, other = NeuralCollapse(CLASSES, WIDTH), NeuralCollapse(CLASSES, WIDTH)
    metric.update(features, labels, labels.roll(1))
    twice = torch.cat([labels.roll(1), labels])
    other.update(torch.cat([features, features + 100]), torch.cat([labels, torch.full_like(labels, -1)]), twice)
    for left, right in zip(metric.compute(), other.compute(), strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right)


def test_classes_count_the_same_however_common_they_are():
    """The same classes, one of them 25 times as often: NC1 does not move, as it would with a mean over images."""
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(4, WIDTH, generator=generator)
    spread = torch.tensor([1.0, 0.1, 0.1, 0.1])
    found = []
    for counts in ((4000, 4000, 4000, 4000), (100_000, 4000, 4000, 4000)):
        labels = torch.arange(4).repeat_interleave(torch.tensor(counts))
        metric = NeuralCollapse(4, WIDTH)
        noise = torch.randn(len(labels), WIDTH, generator=generator)
        metric.update(means[labels] + spread[labels, None] * noise, labels)
        found.append(float(metric.compute().within_class_variability))
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_nearest_centres():
    means = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.5], [1.9, 0.0]])
    assert nearest_centre_disagreement(features, torch.tensor([0, 1, 2, 0]), means) == 0
    assert nearest_centre_disagreement(features, torch.tensor([0, 0, 2, 1]), means) == 0.5


def test_a_class_without_images_is_named():
    metric = NeuralCollapse(3, 2)
    metric.update(torch.randn(4, 2), torch.tensor([0, 0, 2, 2]))
    with pytest.raises(UserError, match="no image of class 1 among 4"):
        metric.compute()
