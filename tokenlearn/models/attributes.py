"""Attributes, their classes and tokens, and the classifier outputs that stand for the classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tokenlearn.errors import UserError
from tokenlearn.losses import AttributeClass, attribute_directions, attribute_logits
from tokenlearn.models.classifier import TimmClassifier
from tokenlearn.notices import warn_once
from tokenlearn.tokens.settings import check_distinct, token_name

_DENIALS = frozenset({"no", "not", "non", "none", "without", "absent", "negative", "false", "off"})


@dataclass(frozen=True)
class LabelledAttribute:
    """An attribute with the names of its classes and tokens.

    Attributes:
        name: name of the attribute, which is also its label in data.
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
        attributes: name of each attribute, to the names of its classes in the order of class indices; None for a
            boolean label, which is absent (class 0, token ``<no-smile>``) or present (class 1, token ``<smile>``).
        placeholder: token of a class; ``{}`` is the class's name in lower case with dashes for spaces.

    Returns:
        The attributes in the same order.

    Raises:
        UserError: for an attribute with fewer than two classes or a repeated class, or for classes with the same
            token.
    """
    named: list[LabelledAttribute] = []
    for name, classes in attributes.items():
        names = (f"no {name}", name) if classes is None else tuple(classes)
        if len(names) < 2 or len(set(names)) < len(names):
            raise UserError(f"attribute '{name}' has classes {list(names)}; name two or more, each once, or null")
        tokens = tuple(token_name(placeholder, item) for item in names)
        named.append(LabelledAttribute(name, names, tokens))
    check_distinct(
        [
            (f"class '{class_name}' of attribute '{item.name}'", token)
            for item in named
            for class_name, token in zip(item.class_names, item.placeholders, strict=True)
        ]
    )
    return named


def check_class_names(attribute: LabelledAttribute, found: Sequence[str], fix: str) -> None:
    """Refuse data whose class indices differ in meaning from the attribute's.

    The data may use other names for the classes, but not the same names in another order. Names in a folder or a
    column are in alphabetical order: ``smile`` comes before ``without``, the reverse of absent and present.

    Args:
        attribute: the attribute to learn.
        found: class names in the data, in the order of class indices; empty if unknown.
        fix: instruction for the user, which ends the message.

    Raises:
        UserError: if the number of classes differs, or a name has another place; it names both lists. There is a
            warning of what two other names are taken for.
    """
    expected, names = attribute.class_names, tuple(found)
    if not names:
        return
    if len(names) != len(expected) or _is_reordered(names, expected):
        raise UserError(
            f"the classes of '{attribute.name}' are {', '.join(names)} in the data and {', '.join(expected)} in the "
            f"model; {fix}"
        )
    boolean = expected == (f"no {attribute.name}", attribute.name)
    if boolean and not _denies(names[0]) and _plain(names[1]) != _plain(attribute.name):
        warn_once(
            f"images of class '{names[0]}' are taken for '{expected[0]}', those of '{names[1]}' for '{expected[1]}'; "
            f"if it is the other way round, {fix}"
        )


def check_class_range(classes: Tensor, attributes: Sequence[LabelledAttribute]) -> None:
    """Refuse class indices that an attribute does not have.

    Args:
        classes: (B, A) class of each of A attributes, -1 where it is not known.
        attributes: A attributes.

    Raises:
        UserError: naming the first attribute whose classes are too few.
    """
    for attribute, largest in zip(attributes, classes.amax(dim=0).tolist(), strict=True):
        if largest >= len(attribute.class_names):
            raise UserError(
                f"the data have class {largest} of '{attribute.name}', whose {len(attribute.class_names)} classes "
                f"in the model are numbered from 0; name all of them in model.attributes.{attribute.name}"
            )


def _is_reordered(names: Sequence[str], expected: Sequence[str]) -> bool:
    """Whether a name is expected at another place, or the first of two classes is present and the second absent."""
    places = {_plain(name): place for place, name in enumerate(expected)}
    if any(places.get(_plain(name), place) != place for place, name in enumerate(names)):
        return True
    return _denies(expected[0]) and not _denies(names[0]) and _denies(names[1])


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _denies(name: str) -> bool:
    """Whether a class's name says that something is absent."""
    return _plain(name).split(" ")[0] in _DENIALS


@dataclass(frozen=True, eq=False)
class Attribute(LabelledAttribute):
    """An attribute with its place among the outputs of a classifier.

    Attributes:
        classes: the K classes as outputs of the classifier.
        multi_label: whether the outputs are independent sigmoids.
        directions: (K, F) directions of the classes in the classifier's feature space, see
            :func:`tokenlearn.losses.attribute_directions`.
    """

    classes: tuple[AttributeClass, ...]
    multi_label: bool
    directions: Tensor

    def logits(self, outputs: Tensor) -> Tensor:
        """Logits (B, K) of the classes from the classifier's outputs (B, num_outputs)."""
        return attribute_logits(outputs, self.classes, self.multi_label)

    def class_index(self, outputs: Tensor) -> Tensor:
        """Most probable class (B,) of each image from the classifier's outputs (B, num_outputs)."""
        return self.logits(outputs).argmax(dim=1)


def resolve_attributes(
    attributes: Mapping[str, Sequence[str] | None], classifier: TimmClassifier, placeholder: str = "<{}>"
) -> list[Attribute]:
    """Find attributes among the labels of a classifier.

    Args:
        attributes: name of each attribute, to the labels that are its classes; None for the label with the
            attribute's name, which is absent (class 0, token ``<no-smile>``) or present (class 1, token ``<smile>``),
            as in a boolean column.
        classifier: the classifier.
        placeholder: token of a class, see :func:`labelled_attributes`.

    Returns:
        The attributes in the same order.

    Raises:
        UserError: as in :func:`labelled_attributes`, and if the classifier lacks a label.
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
