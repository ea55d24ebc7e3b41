"""Class indices of attributes, from the columns of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets  # type: ignore[import-untyped]

from tokenlearn.errors import UserError

UNKNOWN = -1
"""Class index of an image whose class is not known."""


@dataclass(frozen=True)
class Label:
    """How to read the class index of an attribute from a row.

    Attributes:
        attribute: name of the attribute.
        column: column that its class is in.
        place: position in a column of lists.
        stored_names: what the integers of a ``ClassLabel`` column stand for.
        classes: names in the order of class indices; empty where a column of numbers or booleans needs none.
    """

    attribute: str
    column: str
    place: int | None = None
    stored_names: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def class_index(self, row: Mapping[str, Any], name: str) -> int:
        """Class index in a row, -1 where the row has null, NaN or -1.

        Raises:
            UserError: if the row has anything that is not a class; ``name`` says whose row it is.
        """
        value = row[self.column]
        if self.place is not None and isinstance(value, list):
            value = value[self.place] if self.place < len(value) else f"too short: {value}"
        if value is None or value == -1 or value != value:
            return UNKNOWN
        if self.stored_names:
            value = self.stored_names[value]
        if isinstance(value, str) and value in self.classes:
            return self.classes.index(value)
        if isinstance(value, bool | int | float) and value in range(len(self.classes) or int(value) + 1):
            return int(value)
        expected = f"one of {', '.join(self.classes)}" if self.classes else "a class index or true or false"
        raise UserError(
            f"picture '{name}' has '{value}' in column '{self.column}' for '{self.attribute}', not {expected}; "
            "correct it, list it in data.label_classes, or leave it empty where it is not known"
        )


def column_labels(
    dataset: Any,  # noqa: ANN401 - either kind of data set, which have no types
    columns: Mapping[str, str],
    classes: Mapping[str, Sequence[str]],
) -> list[Label]:
    """Labels in columns of their own.

    Args:
        dataset: a ``Dataset`` or ``IterableDataset``.
        columns: attribute to column.
        classes: attribute to class names in the order of class indices; by default those of a ``ClassLabel`` column,
            or the names in a column of names in alphabetical order, which a stream does not tell.

    Raises:
        UserError: if a column is missing, or class names are missing or superfluous.
    """
    if superfluous := set(classes).difference(columns):
        raise UserError(
            f"data.label_classes names '{min(superfluous)}', which data.label_columns has no column for; add it there"
        )
    labels = []
    for attribute, column in columns.items():
        feature = feature_of(dataset, column, "label_columns")
        stored = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()
        names = tuple(classes.get(attribute, stored))
        if not names and getattr(feature, "dtype", None) in ("string", "large_string"):
            if isinstance(dataset, datasets.IterableDataset):
                raise UserError(
                    f"the classes of '{attribute}' are names, and a stream does not tell all of them beforehand; "
                    "list them in data.label_classes"
                )
            names = tuple(sorted(name for name in dataset.unique(column) if name is not None))
        labels.append(Label(attribute, column, None, stored, names))
    return labels


def list_labels(dataset: Any, column: str, attributes: Sequence[str]) -> list[Label]:  # noqa: ANN401 - as above
    """Labels in one column of lists, a place for each attribute.

    Raises:
        UserError: if the column is missing, or its lists are known to have another length.
    """
    feature = feature_of(dataset, column, "attributes_column")
    if getattr(feature, "length", -1) not in (-1, len(attributes)):
        raise UserError(
            f"column '{column}' has {feature.length} attributes, data.attribute_names {len(attributes)}; name each "
            "one, in order"
        )
    return [Label(attribute, column, place) for place, attribute in enumerate(attributes)]


def feature_of(dataset: Any, column: str, setting: str) -> Any:  # noqa: ANN401 - as above
    """Type of a column.

    Raises:
        UserError: if there is no such column; ``setting`` says who names it.
    """
    if column not in dataset.features:
        raise UserError(
            f"data.{setting} names column '{column}', which the data do not have; they have "
            f"{', '.join(sorted(dataset.features))}"
        )
    return dataset.features[column]
