"""Class indices of attributes, from the columns of a data set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenlearn.data.sources import read_rows
from tokenlearn.errors import UserError, shown
from tokenlearn.notices import warn_once

UNKNOWN = -1
"""Class index of an image whose class is not known."""

_MOST_CLASSES = 2**31 - 1  # of a column of numbers, whose classes nothing names
_FIRST_ROWS = 256
_NO_ZERO = "-1 and 1 but no 0 for '{}', and -1 means that the class is not known; write 0 for absent and 1 for present"


@dataclass(frozen=True)
class LabelColumns:
    """Columns of a data set with the classes of attributes.

    Attributes:
        columns: attribute to the column of its class: boolean, index, name, or null if it is not known.
        classes: attribute to its class names in the order of class indices; needed for names in a stream, and for
            another order than the alphabetical one or that of the data.
        list_column: column of lists with a boolean or a class index for each of ``list_attributes``; for portraits
            ``attributes`` by default.
        list_attributes: attributes in the order of the lists.

    Raises:
        UserError: if only one of ``list_column`` and ``list_attributes`` is given.
    """

    columns: dict[str, str] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    list_column: str | None = None
    list_attributes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if (self.list_column is None) != (not self.list_attributes):
            raise UserError(
                f"data.labels.list_column is {self.list_column} and data.labels.list_attributes is "
                f"{self.list_attributes}; set both or neither"
            )


@dataclass(frozen=True)
class Label:
    """Reads the class index of an attribute from a row.

    Attributes:
        attribute: name of the attribute.
        column: column of its class.
        place: position in a column of lists.
        stored_names: names that the integers of a ``ClassLabel`` column stand for.
        classes: names in the order of class indices; empty where a column of numbers or booleans needs none.
    """

    attribute: str
    column: str
    place: int | None = None
    stored_names: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def value(self, entry: Any) -> Any:  # noqa: ANN401 - whatever the column holds
        """The attribute's value in an entry of the column, which may be a list."""
        if self.place is None or not isinstance(entry, list):
            return entry
        return entry[self.place] if self.place < len(entry) else f"too short: {entry}"

    def class_index(self, row: Mapping[str, Any], name: str) -> int:
        """Class index in a row, -1 where the row has null, NaN or -1.

        Args:
            row: columns of the row.
            name: name of the row's image, for the error.

        Raises:
            UserError: if the row has a value that is not a class.
        """
        value = self.value(row[self.column])
        if value is None or value == -1 or value != value:
            return UNKNOWN
        if self.stored_names and 0 <= value < len(self.stored_names):
            value = self.stored_names[value]
        if isinstance(value, str) and value in self.classes:
            return self.classes.index(value)
        most = len(self.classes) or _MOST_CLASSES
        if isinstance(value, bool | int | float) and 0 <= value < most and value == int(value):
            return int(value)
        expected = f"one of {', '.join(self.classes)}" if self.classes else "a class index or true or false"
        raise UserError(
            f"image '{name}' has {shown(value)} in column '{self.column}' for '{self.attribute}', not {expected}; "
            "correct it, list it in data.labels.classes, or leave it empty if it is not known"
        )


def read_labels(dataset: Any, settings: LabelColumns) -> list[Label]:  # noqa: ANN401 - datasets has no types
    """Labels of a data set.

    Args:
        dataset: a ``Dataset`` or ``IterableDataset``.
        settings: where the labels are.

    Raises:
        UserError: if a column is missing, class names are missing or superfluous, or lists are known to have another
            length.
    """
    labels = _column_labels(dataset, settings.columns, settings.classes)
    if settings.list_column is not None:
        labels += _list_labels(dataset, settings.list_column, settings.list_attributes)
    return labels


def check_label_values(dataset: Any, labels: Sequence[Label]) -> None:  # noqa: ANN401 - datasets has no types
    """Refuse numbers -1 and 1 without 0 for absent and present: -1 means here that the class is not known.

    Args:
        dataset: a ``Dataset``, whose columns can be read without its images.
        labels: labels of the data set.

    Raises:
        UserError: naming the column.
    """
    import datasets  # type: ignore[import-untyped]

    for column in dict.fromkeys(label.column for label in labels if not label.stored_names):
        read = [label for label in labels if label.column == column]
        plain = isinstance(dataset.features[column], datasets.Value)
        rows = dataset.unique(column) if plain else dataset[column]
        for label in read:
            if _lacks_zero(label.value(row) for row in rows):
                raise UserError(f"column '{column}' has {_NO_ZERO.format(label.attribute)}")


def check_first_label_values(stream: Any, labels: Sequence[Label]) -> None:  # noqa: ANN401 - as above
    """Warn of numbers -1 and 1 without 0 in the first rows of a stream; a 0 may follow.

    Args:
        stream: an ``IterableDataset``.
        labels: labels of the data set.
    """
    plain = [label for label in labels if not label.stored_names]
    if not plain:
        return
    rows = list(read_rows(stream.select_columns(sorted({label.column for label in plain})).take(_FIRST_ROWS)))
    for label in plain:
        if _lacks_zero(label.value(row[label.column]) for row in rows):
            warn_once(
                f"in the first {len(rows)} rows of the stream, column '{label.column}' has "
                f"{_NO_ZERO.format(label.attribute)}"
            )


def _lacks_zero(values: Iterable[Any]) -> bool:
    """Whether values are -1 and 1 alone, but for those that are no numbers."""
    numbers = {value for value in values if isinstance(value, int | float)}
    return {-1, 1} == {number for number in numbers if not math.isnan(number)}


def _column_labels(
    dataset: Any,  # noqa: ANN401 - as above
    columns: Mapping[str, str],
    classes: Mapping[str, Sequence[str]],
) -> list[Label]:
    """Labels with a column each; class names are by default those of a ``ClassLabel``, else in alphabetical order."""
    import datasets

    if superfluous := set(classes).difference(columns):
        raise UserError(
            f"data.labels.classes names '{min(superfluous)}', which has no column in data.labels.columns; add it there"
        )
    labels = []
    for attribute, column in columns.items():
        feature = feature_of(dataset, column, "labels.columns")
        stored = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()
        names = tuple(classes.get(attribute, stored))
        if not names and getattr(feature, "dtype", None) in ("string", "large_string"):
            if isinstance(dataset, datasets.IterableDataset):
                raise UserError(
                    f"the classes of '{attribute}' are names, and a stream does not tell all of them in advance; "
                    "list them in data.labels.classes"
                )
            names = tuple(sorted(name for name in dataset.unique(column) if name is not None))
        labels.append(Label(attribute, column, None, stored, names))
    return labels


def _list_labels(dataset: Any, column: str, attributes: Sequence[str]) -> list[Label]:  # noqa: ANN401 - as above
    """Labels in one column of lists, a place for each attribute."""
    feature = feature_of(dataset, column, "labels.list_column")
    if getattr(feature, "length", -1) not in (-1, len(attributes)):
        raise UserError(
            f"column '{column}' has {feature.length} attributes, data.labels.list_attributes {len(attributes)}; name "
            "each one, in order"
        )
    return [Label(attribute, column, place) for place, attribute in enumerate(attributes)]


def feature_of(dataset: Any, column: str, setting: str) -> Any:  # noqa: ANN401 - as above
    """Type of a column.

    Args:
        dataset: a ``Dataset`` or ``IterableDataset``.
        column: name of the column.
        setting: setting below ``data`` that names the column, for the error.

    Raises:
        UserError: if there is no such column.
    """
    if column not in dataset.features:
        raise UserError(
            f"data.{setting} names column '{column}', which the data do not have; they have "
            f"{', '.join(map(shown, sorted(dataset.features)))}"
        )
    return dataset.features[column]
