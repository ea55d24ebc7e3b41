"""Attributes and their classes, as a classifier knows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tokenlearn.errors import UserError
from tokenlearn.losses import AttributeClass, attribute_directions, attribute_logits
from tokenlearn.models.classifier import TimmClassifier


@dataclass(frozen=True)
class LabelledAttribute:
    """An attribute and what its classes and tokens are called.

    Attributes:
        name: the user's name for it, which is its label's in data.
        class_names: K class names in the order of class indices.
        placeholders: K placeholder tokens.
    """

    name: str
    class_names: tuple[str, ...]
    placeholders: tuple[str, ...]


def labelled_attributes(
    attributes: Mapping[str, Sequence[str] | None], placeholder: str = "<{}>"
) -> list[LabelledAttribute]:
    """Name the classes and tokens of attributes.

    Args:
        attributes: name of each attribute, to the names of its classes in the order of class indices; None is a
            boolean label, absent (class 0, token ``<no-smile>``) or present (class 1, token ``<smile>``).
        placeholder: how a class gives its token's name.

    Raises:
        UserError: for an attribute of fewer than two classes or of the same class twice, or classes that give the same
            token.
    """
    named: list[LabelledAttribute] = []
    owners: dict[str, str] = {}
    for name, classes in attributes.items():
        names = (f"no {name}", name) if classes is None else tuple(classes)
        if len(names) < 2 or len(set(names)) < len(names):
            raise UserError(f"attribute '{name}' has classes {list(names)}; name two or more, each once, or null")
        tokens = tuple(placeholder.format(item.lower().replace(" ", "-")) for item in names)
        for token in tokens:
            if token in owners:
                raise UserError(
                    f"attributes '{owners[token]}' and '{name}' both have the token '{token}'; let model.placeholder "
                    "have a '{}' for the class, and name each class in one attribute only"
                )
            owners[token] = name
        named.append(LabelledAttribute(name, names, tokens))
    return named


def check_class_names(attribute: LabelledAttribute, found: Sequence[str], fix: str) -> None:
    """Refuse class names of data whose indices mean something else than the attribute's.

    The same classes may be called otherwise, but not come in another order.

    Args:
        attribute: what is learned.
        found: class names in the data, in the order of class indices; empty where it is not known.
        fix: what the user can do about it.

    Raises:
        UserError: naming both lists and ending with the fix.
    """
    ours, theirs = attribute.class_names, tuple(found)
    if theirs and (len(theirs) != len(ours) or (set(theirs) == set(ours) and theirs != ours)):
        raise UserError(
            f"the classes of '{attribute.name}' are {', '.join(theirs)} in the data and {', '.join(ours)} in the "
            f"model; {fix}"
        )


@dataclass(frozen=True, eq=False)
class Attribute(LabelledAttribute):
    """An attribute as a classifier knows it, whose labels are the class names, or absence and presence of one.

    Attributes:
        classes: the K classes as outputs of the classifier.
        multi_label: whether these outputs are independent sigmoids.
        directions: (K, F) what the classifier's head takes for the classes.
    """

    classes: tuple[AttributeClass, ...]
    multi_label: bool
    directions: Tensor

    def logits(self, outputs: Tensor) -> Tensor:
        """Logits (B, K) of the classes from the classifier's outputs (B, num_outputs)."""
        return attribute_logits(outputs, self.classes, self.multi_label)

    def class_index(self, outputs: Tensor) -> Tensor:
        """Class (B,) that the classifier takes each image for, from its outputs (B, num_outputs)."""
        return self.logits(outputs).argmax(dim=1)


def resolve_attributes(
    attributes: Mapping[str, Sequence[str] | None], classifier: TimmClassifier, placeholder: str = "<{}>"
) -> list[Attribute]:
    """Look the user's attributes up among a classifier's labels.

    Args:
        attributes: name of each attribute, to the labels that are its classes; None is the label of that name, absent
            (class 0, token ``<no-smile>``) or present (class 1, token ``<smile>``), as in a column of booleans.
        classifier: whose labels are meant.
        placeholder: how a class gives its token's name.

    Raises:
        UserError: as :func:`labelled_attributes` does, and for an attribute that the classifier does not have.
    """
    resolved: list[Attribute] = []
    for item, labels in zip(labelled_attributes(attributes, placeholder), attributes.values(), strict=True):
        classes: tuple[AttributeClass, ...]
        if labels is None:
            output = classifier.label_index(item.name)
            classes = ((output, False), (output, True))
        else:
            classes = tuple((classifier.label_index(label), True) for label in labels)
        directions = attribute_directions(classifier.head_weight, classes, classifier.multi_label)
        resolved.append(
            Attribute(item.name, item.class_names, item.placeholders, classes, classifier.multi_label, directions)
        )
    return resolved
