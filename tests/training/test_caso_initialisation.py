import pytest
import torch

from tests.training.caso_tasks import ATTRIBUTES, Faces, image_batch, labelled_batches
from tokenlearn.errors import UserError
from tokenlearn.models.attributes import resolve_attributes
from tokenlearn.models.classifier import TimmClassifier
from tokenlearn.tokens.settings import TokenSettings
from tokenlearn.training import Initialisation
from tokenlearn.training.caso_initialisation import (
    ClassMeans,
    first_batches,
    initial_words,
    log_collapse,
    measure_class_means,
)

MEASURES = (
    "within_class_variability",
    "equiangularity",
    "maximal_angle",
    "self_duality",
    "nearest_centre_disagreement",
)


@pytest.fixture(scope="module")
def classifier(faces):
    return TimmClassifier(str(faces / "guide"))


@pytest.fixture
def attributes(classifier):
    return resolve_attributes(ATTRIBUTES, classifier)


@pytest.fixture
def measured(classifier, attributes):
    def measure(batches):
        return measure_class_means(
            attributes,
            batches,
            lambda batch: classifier.features(batch.images),
            classifier.classify,
            torch.device("cpu"),
        )

    return measure


class Log:
    def __init__(self):
        self.figures = {}

    def log_metrics(self, metrics, step):
        self.figures |= {(step, name): value for name, value in metrics.items()}


def test_class_means_of_labelled_images(measured, classifier, attributes):
    batches = labelled_batches()
    smile, hair = measured(batches)
    features = classifier.features(torch.cat([batch.images for batch in batches]))
    labels = torch.cat([batch.labels["smile"] for batch in batches])
    centre = features[labels >= 0].mean(dim=0)
    means = torch.stack([features[labels == k].mean(dim=0) for k in (0, 1)])
    torch.testing.assert_close(smile.directions, means - centre, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(smile.global_mean, centre, rtol=1e-3, atol=1e-5)
    assert smile.counts.tolist() == [3, 4]
    assert set(smile.collapse) == set(MEASURES)
    assert 0 <= smile.collapse["self_duality"] <= 2
    logits = classifier.classify(features)[labels >= 0]
    nearest = (features[labels >= 0, None] - means).square().sum(dim=2).argmin(dim=1)
    decided = (logits[:, 0] > 0).long()  # present or absent
    assert smile.collapse["nearest_centre_disagreement"] == pytest.approx(float((nearest != decided).double().mean()))
    in_classifier = smile.of(attributes[0])
    assert in_classifier.classes == ((0, False), (0, True))
    assert in_classifier.class_directions is smile.directions
    assert_of_head(hair, attributes[1])


def assert_of_head(means, attribute):
    assert torch.equal(means.directions, attribute.directions)
    assert not means.global_mean.any()
    assert means.counts is None
    assert not means.collapse


def test_a_class_without_images_leaves_the_head(measured, attributes):
    with pytest.warns(UserWarning, match="'smile'.*class 0"):
        smile, _ = measured([image_batch(2, {"smile": torch.tensor([1, 1])})])
    assert_of_head(smile, attributes[0])


def test_images_are_read_up_to_the_first_batch_without_labels(measured, attributes):
    batches = iter([image_batch(), *labelled_batches()])
    for means, attribute in zip(measured(batches), attributes, strict=True):
        assert_of_head(means, attribute)
    assert len(list(batches)) == 2


def test_collapse_is_logged_for_each_attribute(measured, attributes):
    log = Log()
    means = measured(labelled_batches())
    log_collapse(attributes, means, [log], step=3)
    assert log.figures == {(3, f"collapse/{name}/smile"): means[0].collapse[name] for name in MEASURES}
    log_collapse(attributes, [ClassMeans.of_head(attribute) for attribute in attributes], [log], step=4)
    assert len(log.figures) == len(MEASURES)


def test_first_batches():
    data = Faces(labelled_batches())
    assert [batch.names for batch in first_batches(data, 1, torch.device("cpu"))] == [data.batches[0].names]
    assert len(list(first_batches(data, 8, torch.device("cpu")))) == 2
    assert not list(first_batches(data, 0, torch.device("cpu")))
    assert not list(first_batches(None, 8, torch.device("cpu")))


def test_initial_words(attributes):
    words = initial_words(TokenSettings(initial_words="a {}"), Initialisation(), attributes)
    assert words["<no-smile>"] == "a no smile"
    assert words["<red>"] == "a red"
    assert set(initial_words(TokenSettings(), Initialisation("ridge"), attributes).values()) == {"a"}
    names = [name for attribute in attributes for name in attribute.class_names]
    of_each = {name: f"word{index}" for index, name in enumerate(names)}
    found = initial_words(TokenSettings(class_words=of_each), Initialisation(), attributes)
    assert list(found.values()) == list(of_each.values())
    found = initial_words(TokenSettings(class_words={names[1]: "king"}), Initialisation(), attributes)
    assert list(found.values())[:3] == ["a", "king", "a"]
    with pytest.raises(UserError, match=r"class_words differs between classes, but initialisation\.kind ridge"):
        initial_words(TokenSettings(class_words=of_each), Initialisation("ridge"), attributes)
    with pytest.raises(UserError, match=f"has words for 'another', but the classes are {names[0]}"):
        initial_words(TokenSettings(class_words={"another": "a"}), Initialisation(), attributes)
    with pytest.raises(UserError, match="class_words of 'smile' is empty"):
        TokenSettings(class_words={"smile": " "})
    with pytest.raises(UserError, match=r"initial_words is null.* words for smile; set one"):
        TokenSettings(initial_words=None, class_words={"smile": "a"})
