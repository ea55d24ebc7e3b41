import pytest
import torch

from tests.training.caso_tasks import ATTRIBUTES
from tokenlearn.models.attributes import resolve_attributes
from tokenlearn.models.classifier import TimmClassifier
from tokenlearn.training.caso_targets import choose_targets, named_noise, present_classes, rarity

UNKNOWN = [-1, -1]


def choose(count, present=UNKNOWN, first=0, **changes):
    settings = {
        "num_classes": [2, 3],
        "class_counts": [None, None],
        "targets": "any",
        "timesteps": [401],
        "shape": (4, 8, 8),
        "seed": 0,
    }
    return choose_targets(range(first, first + count), torch.tensor([present] * count), **(settings | changes))


def pairs(targets):
    return set(zip(targets.attributes, targets.classes.tolist(), strict=True))


def test_any_class_of_any_attribute_and_any_timestep():
    targets = choose(300, timesteps=range(301, 306))
    assert pairs(targets) == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)}
    assert set(targets.timesteps.tolist()) == set(range(301, 306))
    assert sum(attribute == 0 for attribute in targets.attributes) / 300 == pytest.approx(1 / 2, abs=0.08)
    assert targets.noise.shape == (300, 4, 8, 8)
    assert targets.noise.std() == pytest.approx(1, abs=0.02)
    assert not targets.present.any()


def test_choices_depend_on_the_position_and_the_seed_alone():
    many, one, other = choose(8), choose(1, first=7), choose(1, first=7, seed=1)
    assert torch.equal(one.noise[0], many.noise[7])
    assert pairs(one) <= pairs(many)
    assert (one.attributes[0], one.classes[0]) == (many.attributes[7], many.classes[7])
    assert not torch.equal(other.noise, one.noise)


def test_present_is_the_class_of_the_attribute_that_was_chosen():
    targets = choose(50, [1, 2])
    expected = [k == (1, 2)[attribute] for attribute, k in zip(targets.attributes, targets.classes, strict=True)]
    assert targets.present.tolist() == expected
    assert any(expected)


def test_missing_targets_are_classes_that_the_image_lacks_and_rare_classes_are_chosen_more():
    counts = [torch.tensor([9, 1]), torch.tensor([4, 3, 3])]

    def missing(present):
        targets = choose(400, present, targets="missing", class_counts=counts)
        return pairs(targets), sum(attribute == 0 for attribute in targets.attributes) / 400

    found, share = missing([1, 2])
    assert found == {(0, 0), (1, 0), (1, 1)}
    # One image of ten smiles, which makes it five times as rare as one of two; three of ten have hair 2.
    weights = 10 / (2 * 1), 10 / (3 * 3)
    assert share == pytest.approx(weights[0] / sum(weights), abs=0.06)
    found, share = missing([0, 2])
    assert found == {(0, 1), (1, 0), (1, 1)}
    assert share == pytest.approx(1 / 3, abs=0.06)
    found, share = missing(UNKNOWN)
    assert found == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)}
    assert share == pytest.approx(1 / 2, abs=0.07)


def test_rarity():
    counts = torch.tensor([9, 1, 0])
    assert [rarity(counts, label) for label in (0, 1, 2, -1)] == pytest.approx([10 / 27, 10 / 3, 10 / 3, 1])
    assert rarity(None, 0) == 1


def test_the_classifier_decides_where_a_label_is_not_known(faces):
    attributes = resolve_attributes(ATTRIBUTES, TimmClassifier(str(faces / "guide")))
    logits = torch.tensor([[2.0, 0, 0, 5, 1], [-2.0, 0, 7, 5, 1]])
    labels = {"smile": torch.tensor([0, -1]), "age": torch.tensor([3, 3])}
    assert present_classes(labels, attributes, logits, None).tolist() == [[0, -1], [-1, -1]]
    assert present_classes(labels, attributes, logits, lambda: logits).tolist() == [[0, 1], [0, 0]]

    def never():
        raise AssertionError

    known = {"smile": torch.tensor([0, 1]), "hair": torch.tensor([2, 0])}
    assert present_classes(known, attributes, logits, never).tolist() == [[0, 2], [1, 0]]


def test_named_noise_depends_on_the_name_alone():
    noise = [named_noise(names, (4, 8, 8)) for names in (["a", "b"], ["b", "c"])]
    assert torch.equal(noise[0][1], noise[1][0])
    assert not torch.equal(noise[0][0], noise[0][1])
