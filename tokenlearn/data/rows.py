"""Rows of a data set: which ones are used, and which of them are held out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenlearn.data.labels import feature_of
from tokenlearn.data.sources import Item, ItemSource, ShuffledSource, StreamedSource, items_below, read_rows
from tokenlearn.errors import UserError, check_at_least

Keep = dict[str, list[bool | int | str]]
"""Column to the values of which a row must have one; other rows are left out."""

_HELD_OUT_SEED = 0  # not a setting: another order of training must not move test images into the training


class Rows(ABC):
    """A part of a data set.

    Attributes:
        count: number of rows; None if a stream does not tell it.
    """

    count: int | None

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """All rows once, in order."""

    @abstractmethod
    def source(self, seed: int, block_size: int) -> ItemSource:
        """All rows again and again, shuffled; in a stream, ``block_size`` rows among each other."""

    @abstractmethod
    def number(self, item: Item) -> int:
        """Position of a row in the data set."""

    @abstractmethod
    def row(self, item: Item) -> dict[str, Any]:
        """Columns of a row."""


class IndexedRows(Rows):
    """Some rows of a ``Dataset``.

    Args:
        dataset: the data set.
        indices: (N,) positions of the rows.
    """

    def __init__(self, dataset: Any, indices: np.ndarray) -> None:  # noqa: ANN401 - datasets has no types
        self.dataset, self.indices = dataset, indices
        self.count = len(indices)

    def items(self) -> Iterator[Item]:
        """See :class:`Rows`."""
        return items_below(len(self.indices))

    def source(self, seed: int, block_size: int) -> ItemSource:
        """See :class:`Rows`."""
        return ShuffledSource(len(self.indices), seed)

    def number(self, item: Item) -> int:
        """See :class:`Rows`."""
        return int(self.indices[item.index])

    def row(self, item: Item) -> dict[str, Any]:
        """See :class:`Rows`."""
        row: dict[str, Any] = self.dataset[self.number(item)]
        return row


class StreamedRows(Rows):
    """Some consecutive rows of an ``IterableDataset``.

    Args:
        open_stream: opens the stream.
        first: position of the first row.
        count: number of rows; None for all to the end.
    """

    def __init__(self, open_stream: Callable[[], Any], first: int, count: int | None) -> None:
        self.open_stream, self.first, self.count = open_stream, first, count

    def open(self) -> Any:  # noqa: ANN401 - datasets has no types
        """The stream of these rows alone."""
        stream = self.open_stream().skip(self.first)
        return stream if self.count is None else stream.take(self.count)

    def items(self) -> Iterator[Item]:
        """See :class:`Rows`."""
        return (Item(0, index, row) for index, row in enumerate(read_rows(self.open())))

    def source(self, seed: int, block_size: int) -> ItemSource:
        """See :class:`Rows`."""
        return StreamedSource(self.open, seed, block_size)

    def number(self, item: Item) -> int:
        """See :class:`Rows`."""
        return self.first + item.index

    def row(self, item: Item) -> dict[str, Any]:
        """See :class:`Rows`."""
        row: dict[str, Any] = item.row
        return row


def row_name(row: Mapping[str, Any], number: int, image_column: str, source: str) -> str:
    """Name of a row's image: its path below the folder of the data, its file name, or its number."""
    encoded = row[image_column]
    path = encoded and encoded.get("path")
    if not path:
        return f"{number:08d}"
    folder = Path(source).expanduser().resolve()
    return str(Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else Path(path).name


@dataclass(frozen=True)
class HeldOut:
    """Numbers of images that nothing is learned from.

    They are the same images whatever the seed of the training, spread over the data, or the first ones of a stream.

    Attributes:
        validation: images of each validation; 0 for none.
        test: images of the test; 0 for none.
        transfer: images of a second part of the test, of other kinds than the training images, which shows whether the
            tokens work for these too; 0 for none.
        transfer_keep: like ``data.keep``, for the images of the transfer test.

    Raises:
        UserError: for a number below 0.
    """

    validation: int = 64
    test: int = 64
    transfer: int = 0
    transfer_keep: Keep = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_at_least("data.held_out", 0, validation=self.validation, test=self.test, transfer=self.transfer)


class Parts(NamedTuple):
    """The parts of a data set, none of which shares a row with another."""

    train: Rows
    validation: Rows
    test: Rows
    transfer: Rows


def indexed_parts(
    dataset: Any,  # noqa: ANN401 - datasets has no types
    usable: np.ndarray,
    *,
    keep: Keep,
    held_out: HeldOut,
    source: str,
) -> Parts:
    """Split a ``Dataset``.

    Args:
        dataset: the data set.
        usable: (N,) positions of the rows whose images can be decoded.
        keep: which of them are trained on.
        held_out: numbers of rows to hold out.
        source: name of the data, for errors.

    Raises:
        UserError: if too few rows are left, or a setting does not fit the columns.
    """
    count = held_out.validation + held_out.test
    others = usable[:0]
    if held_out.transfer:
        others = usable[kept_mask(dataset, held_out.transfer_keep, "held_out.transfer_keep")[usable]]
    others = np.random.default_rng(_HELD_OUT_SEED).permutation(others)[: held_out.transfer]
    if len(others) < held_out.transfer:
        raise UserError(
            f"'{source}' has {len(others)} usable images of data.held_out.transfer_keep, fewer than "
            f"data.held_out.transfer {held_out.transfer}; lower it"
        )
    rows = np.setdiff1d(usable[kept_mask(dataset, keep, "keep")[usable]], others)
    if len(rows) <= count:
        raise UserError(
            f"'{source}' has {len(rows)} usable images, too few to hold out {held_out.validation} for validation and "
            f"{held_out.test} for test; lower data.held_out.validation and data.held_out.test"
        )
    order = np.random.default_rng(_HELD_OUT_SEED).permutation(rows)
    return Parts(
        train=IndexedRows(dataset, np.sort(order[count:])),
        validation=IndexedRows(dataset, order[held_out.test : count]),
        test=IndexedRows(dataset, order[: held_out.test]),
        transfer=IndexedRows(dataset, others),
    )


def streamed_parts(
    open_stream: Callable[[], Any],
    dataset: Any,  # noqa: ANN401 - datasets has no types
    *,
    keep: Keep,
    held_out: HeldOut,
) -> Parts:
    """Split a stream: the first rows are held out.

    Args:
        open_stream: opens the stream.
        dataset: the stream, opened to read the types of its columns.
        keep: which rows are trained on.
        held_out: numbers of rows to hold out.

    Raises:
        UserError: if a setting does not fit the columns.
    """
    stream = partial(_kept_stream, open_stream, _stored_values(dataset, keep, "keep"))
    transfer_keep = _stored_values(dataset, held_out.transfer_keep, "held_out.transfer_keep")
    transfer = partial(_kept_stream, open_stream, transfer_keep)
    return Parts(
        train=StreamedRows(stream, held_out.validation + held_out.test, None),
        validation=StreamedRows(stream, held_out.test, held_out.validation),
        test=StreamedRows(stream, 0, held_out.test),
        transfer=StreamedRows(transfer, 0, held_out.transfer),
    )


def kept_mask(dataset: Any, keep: Keep, setting: str) -> np.ndarray:  # noqa: ANN401 - datasets has no types
    """Whether each row of a ``Dataset`` has the values to keep, (N,) bool.

    Raises:
        UserError: if there is no such column or class; ``setting`` is named.
    """
    kept = np.ones(len(dataset), dtype=bool)
    for column, values in _stored_values(dataset, keep, setting).items():
        kept &= np.fromiter((value in values for value in dataset[column]), dtype=bool, count=len(dataset))
    return kept


def _stored_values(
    dataset: Any,  # noqa: ANN401 - datasets has no types
    keep: Keep,
    setting: str,
) -> dict[str, list[Any]]:
    """Values to keep as the columns hold them: integers for class names."""
    import datasets  # type: ignore[import-untyped]

    stored: dict[str, list[Any]] = {}
    for column, values in keep.items():
        feature = feature_of(dataset, column, setting)
        if isinstance(feature, datasets.ClassLabel):
            if unknown := [value for value in values if value not in feature.names]:
                raise UserError(
                    f"data.{setting}: column '{column}' has no class '{unknown[0]}'; it has {', '.join(feature.names)}"
                )
            stored[column] = [feature.names.index(value) for value in values]
        else:
            stored[column] = list(values)
    return stored


def _kept_stream(open_stream: Callable[[], Any], keep: Mapping[str, Sequence[Any]]) -> Any:  # noqa: ANN401 - as above
    if not keep:
        return open_stream()
    return open_stream().filter(partial(_is_kept, list(keep.values())), input_columns=list(keep))


def _is_kept(keep: Sequence[Sequence[Any]], *values: object) -> bool:
    return all(value in allowed for value, allowed in zip(values, keep, strict=True))
