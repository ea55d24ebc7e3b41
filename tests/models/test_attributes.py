import pytest
import torch

from tests.tiny import tiny_classifier
from tokenlearn.errors import UserError
from tokenlearn.models.attributes import check_class_names, labelled_attributes, resolve_attributes
from tokenlearn.models.classifier import TimmClassifier


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    labels = ["smile", "hat", "black", "glasses", "red"]
    return TimmClassifier(str(tiny_classifier(tmp_path_factory.mktemp("faces"), labels, multi_label=True)))


def test_attributes_of_a_classifier(classifier):
    smile, hair = resolve_attributes({"smile": None, "hair": ["red", "black"]}, classifier, "<my-{}>")
    assert (smile.class_names, smile.placeholders) == (("no smile", "smile"), ("<my-no-smile>", "<my-smile>"))
    assert (hair.class_names, hair.placeholders) == (("red", "black"), ("<my-red>", "<my-black>"))
    outputs = torch.tensor([[-1.0, 9, 0, 0, 2], [1.0, 0, 3, 0, 2]])
    assert smile.class_index(outputs).tolist() == [0, 1]
    assert hair.class_index(outputs).tolist() == [0, 1]
    torch.testing.assert_close(smile.logits(outputs), torch.tensor([[0.0, -1], [0, 1]]))
    assert torch.equal(smile.directions[1], classifier.head_weight[0] / 2)
    torch.testing.assert_close(
        hair.directions[0] - hair.directions[1], classifier.head_weight[4] - classifier.head_weight[2]
    )


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"smyle": None}, r"'smyle'.*'smile'"),
        ({"hair": ["black", "blond"]}, r"'blond'"),
        ({"hair": ["black"]}, r"'hair'.*\['black'\]"),
        ({"hair": ["black", "red", "black"]}, r"'hair'.*\['black', 'red', 'black'\]"),
        ({"hair": ["black", "red"], "hat": ["hat", "red"]}, r"'hair'.*'hat'.*'<red>'.*tokens\.placeholder"),
    ],
)
def test_attributes_that_a_classifier_lacks(classifier, attributes, words):
    with pytest.raises(UserError, match=words) as raised:
        resolve_attributes(attributes, classifier)
    assert "\n" not in str(raised.value)


def test_class_names_of_data_may_differ_but_not_their_order():
    (hair,) = labelled_attributes({"hair": ["red", "black"]})
    for names in ((), ("red", "black"), ("rouge", "noir")):
        check_class_names(hair, names, "relabel it")
    for names in (("black", "red"), ("red", "black", "blond")):
        with pytest.raises(UserError, match=f"'hair'.*{', '.join(names)}.*red, black.*relabel it"):
            check_class_names(hair, names, "relabel it")
