import pytest
import torch
from torch.nn import functional

from tokenlearn.errors import UserError
from tokenlearn.losses import (
    AttributeInClassifier,
    CasoObjective,
    EditedImages,
    attribute_logits,
    class_mean_cosine,
    label_preservation,
    latent_reconstruction,
    probability_error,
)

OUTPUTS, FEATURES = 5, 7
SMILE, HAIR = ((0, False), (0, True)), ((2, True), (3, True), (4, True))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=[True, False], ids=["sigmoids", "softmax"])
def attributes(request):
    return [
        AttributeInClassifier(classes, request.param, normal(len(classes), FEATURES, seed=index), normal(FEATURES))
        for index, classes in enumerate((SMILE, HAIR))
    ]


@pytest.fixture
def images():
    """Five edits; all but the second and the fourth are compared with the unedited image."""
    return EditedImages(
        attributes=[1, 0, 1, 0, 0],
        targets=torch.tensor([2, 1, 0, 0, 1]),
        present=torch.tensor([True, False, False, True, False]),
        latents=normal(5, 4, 2, 2, seed=1),
        edited=normal(5, 4, 2, 2, seed=2).requires_grad_(),
        features=normal(5, FEATURES, seed=3).requires_grad_(),
        logits=normal(5, OUTPUTS, seed=4).requires_grad_(),
        compared=[0, 2, 4],
        unedited_logits=normal(3, OUTPUTS, seed=5),
    )


def written_out(images, attributes, editing):
    """The three terms of the equation, image by image."""
    terms = []
    for row, (index, target) in enumerate(zip(images.attributes, images.targets.tolist(), strict=True)):
        attribute, logits, multi_label = attributes[index], images.logits[row], attributes[index].multi_label
        if index == 1:
            log_probabilities = logits[2:5].log_softmax(0)
        elif multi_label:
            log_probabilities = torch.stack([functional.logsigmoid(-logits[0]), functional.logsigmoid(logits[0])])
        else:
            shares = logits.softmax(0)
            log_probabilities = torch.stack([1 - shares[0], shares[0]]).log()
        if editing == "cross_entropy":
            edit = -log_probabilities[target]
        elif editing == "probability_error":
            edit = (1 - log_probabilities[target].exp()) ** 2
        else:
            offset, direction = images.features[row] - attribute.global_mean, attribute.class_directions[target]
            edit = 1 - offset @ direction / (offset.norm() * direction.norm())
        reconstruction = ((images.edited[row] - images.latents[row]) ** 2).mean()
        preservation = torch.zeros((), dtype=torch.float64)
        if row in images.compared:
            others = [1, 2, 3, 4] if index == 0 else [0, 1]
            before, after = images.unedited_logits[images.compared.index(row)][others], logits[others]
            if multi_label:
                preservation = (after.sigmoid() - before.sigmoid()).abs().mean()
            else:
                preservation = (after.softmax(0) - before.softmax(0)).abs().sum() / 2
        terms.append(torch.stack([edit, reconstruction, preservation]))
    return torch.stack(terms).unbind(dim=1)


@pytest.mark.parametrize("editing", ["cross_entropy", "probability_error", "class_mean"])
def test_objective_equals_the_equation_written_out(images, attributes, editing):
    objective = CasoObjective(editing, reconstruction_weight=0.3, preservation_weight=0.7, preservation_every=2)
    found = objective(images, attributes)
    edit, reconstruction, preservation = written_out(images, attributes, editing)
    expected = (edit + 0.3 * reconstruction + 0.7 * 2 * preservation).mean()
    torch.testing.assert_close(found.editing, edit)
    torch.testing.assert_close(found.reconstruction, reconstruction)
    torch.testing.assert_close(found.preservation, 2 * preservation)
    torch.testing.assert_close(found.loss, expected)
    inputs = [images.edited, images.features if editing == "class_mean" else images.logits]
    for ours, theirs in zip(
        torch.autograd.grad(found.loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("skip_present", [True, False])
@pytest.mark.parametrize("reconstruct_present_only", [True, False])
def test_images_that_show_the_class_already(images, attributes, skip_present, reconstruct_present_only):
    objective = CasoObjective(skip_present=skip_present, reconstruct_present_only=reconstruct_present_only)
    assert objective.uses_present == (skip_present or reconstruct_present_only)
    found = objective(images, attributes)
    edit, reconstruction, _ = written_out(images, attributes, "cross_entropy")
    if skip_present:
        edit = edit * torch.tensor([0, 1, 1, 0, 1])
    if reconstruct_present_only:
        reconstruction = reconstruction * torch.tensor([1, 0, 0, 1, 0])
    torch.testing.assert_close(found.editing, edit)
    torch.testing.assert_close(found.reconstruction, reconstruction)
    torch.testing.assert_close(found.loss, (edit + 0.1 * reconstruction).mean())
    assert found.preservation is None


def test_rows_of_the_preservation_loss():
    positions = range(6, 14)
    assert CasoObjective().compared_rows(positions) == []
    assert CasoObjective(preservation_weight=0.1).compared_rows(positions) == list(range(8))
    assert CasoObjective(preservation_weight=0.1, preservation_every=4).compared_rows(positions) == [2, 6]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reconstruction_weight": -0.1}, r"objective\.reconstruction_weight.* 0, got -0\.1"),
        ({"reconstruction_weight": float("nan")}, "reconstruction_weight.*nan"),
        ({"preservation_weight": -1.0}, r"preservation_weight.*-1\.0"),
        ({"preservation_every": 0}, r"objective\.preservation_every.* 1, got 0"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(UserError, match=words):
        CasoObjective(**settings)


DIRECTIONS = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, -1.0]])
CENTRE = torch.tensor([5.0, -7.0])


@pytest.mark.parametrize(
    ("offset", "target", "expected"),
    [([4.0, 0.0], 0, 0.0), ([4.0, 0.0], 1, 1.0), ([-0.1, 0.0], 0, 2.0), ([1.0, 1.0], 1, 1 - 0.5**0.5)],
)
def test_known_angles_from_the_global_mean(offset, target, expected):
    features = (CENTRE + torch.tensor(offset))[None]
    loss = class_mean_cosine(features, torch.tensor([target]), DIRECTIONS, CENTRE)
    torch.testing.assert_close(loss, torch.tensor([expected]), rtol=1e-5, atol=1e-6)


def test_each_sample_has_its_own_class():
    features = CENTRE + torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([2, 0, 1, 0])
    losses = class_mean_cosine(features, targets, DIRECTIONS.double(), CENTRE.double())
    separate = [class_mean_cosine(features[i : i + 1], targets[i : i + 1], DIRECTIONS, CENTRE) for i in range(4)]
    torch.testing.assert_close(losses, torch.cat(separate))


def test_no_saturation_far_along_the_direction():
    features = (CENTRE + torch.tensor([1000.0, 300.0]))[None].requires_grad_()
    class_mean_cosine(features, torch.tensor([0]), DIRECTIONS, CENTRE).sum().backward()
    tangent = torch.tensor([-300.0, 1000.0]) / 1000**2
    assert features.grad is not None
    cosine = functional.cosine_similarity(features.grad[0], tangent, dim=0)
    torch.testing.assert_close(cosine, torch.tensor(1.0))  # straight to the direction's ray
    assert features.grad.norm() * 1000 > 0.2  # relative to the features' length


def test_binary_attribute_is_the_released_loss():
    logit = torch.linspace(-4, 4, 9)
    logits = attribute_logits(logit[:, None], [(0, True), (0, False)], multi_label=True)
    for target, probability in ((0, 1), (1, 0)):
        losses = probability_error(logits, torch.full((9,), target))
        torch.testing.assert_close(losses, (probability - logit.sigmoid()) ** 2)


def test_several_classes_use_the_softmax():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 3, 3, 0])
    expected = (1 - logits.softmax(1)[torch.arange(6), targets]) ** 2
    torch.testing.assert_close(probability_error(logits, targets), expected)


def test_gradient_vanishes_where_the_classifier_is_confidently_wrong():
    logits = torch.tensor([[-20.0, 20.0]], requires_grad=True)
    probability_error(logits, torch.tensor([0])).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-10


def test_mean_squared_error_of_each_sample():
    predicted, latents = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([functional.mse_loss(p, z) for p, z in zip(predicted, latents, strict=True)])
    torch.testing.assert_close(latent_reconstruction(predicted, latents), expected)
    weights = torch.tensor([0.5, 2.0, 0.0])
    torch.testing.assert_close(latent_reconstruction(predicted, latents, weights), expected * weights)


def test_masked_samples_have_neither_loss_nor_gradient():
    predicted = torch.ones(2, 4, 2, 2, requires_grad=True)
    losses = latent_reconstruction(predicted, torch.zeros(2, 4, 2, 2), torch.tensor([True, False]))
    assert losses.tolist() == [1, 0]
    losses.sum().backward()
    assert predicted.grad is not None
    assert predicted.grad[0].all()
    assert not predicted.grad[1].any()


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
