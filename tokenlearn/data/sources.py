"""Endless sources of items: the order of training data, resumable at any item."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from tokenlearn.errors import UserError, reason_of

T = TypeVar("T")

Position = dict[str, Any]
"""Where a source is, in plain numbers, strings, lists and dictionaries; empty for the beginning."""


@dataclass(frozen=True, slots=True)
class Item:
    """The place in the data that a sample is made from.

    Attributes:
        pass_number: number of passes through the data before this one.
        index: place in the data, from 0.
        row: the row itself where it cannot be looked up by its index.
    """

    pass_number: int
    index: int
    row: Any = None


def items_below(count: int) -> Iterator[Item]:
    """The items 0 to ``count - 1``, once and in order."""
    return (Item(0, index) for index in range(count))


def read_rows(rows: Iterable[T]) -> Iterator[T]:
    """The rows of a stream; an error of reading, which is nearly always in the data, becomes one line.

    Raises:
        UserError: if a row cannot be read.
    """
    try:
        yield from rows
    except UserError:
        raise
    except Exception as error:  # readers of files raise errors of many kinds
        raise UserError(
            f"the data stream cannot be read ({reason_of(error)}); check the files of data.source, or copy them again"
        ) from error


class Skipped(NamedTuple):
    """An item that gives no sample.

    Attributes:
        name: the name that users know it by.
        reason: reason in a few words.
    """

    name: str
    reason: str


class ItemSource(Protocol):
    """Endless items in an order that depends on nothing but the source."""

    def items(self, position: Position) -> Iterator[tuple[Position, Item]]:
        """Items from ``position`` on, each with the position behind it."""


class CountingSource:
    """Indices 0, 1, 2 and so on, each once."""

    def items(self, position: Position) -> Iterator[tuple[Position, Item]]:
        """See :class:`ItemSource`."""
        for index in itertools.count(position.get("taken", 0)):
            yield {"taken": index + 1}, Item(0, index)


class ShuffledSource:
    """Indices below ``size`` in passes; each pass has every index once, in another order.

    Args:
        size: number of indices.
        seed: seed of all orders.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def items(self, position: Position) -> Iterator[tuple[Position, Item]]:
        """See :class:`ItemSource`."""
        taken = position.get("taken", 0)
        while True:
            number, start = divmod(taken, self.size)
            order = np.random.default_rng([self.seed, number]).permutation(self.size)
            for index in order[start:]:
                taken += 1
                yield {"taken": taken}, Item(number, int(index))


class StreamedSource:
    """Rows of an ``IterableDataset`` in passes, shuffled a block at a time; every pass has every row once.

    A block can be read again, unlike a reservoir that is refilled row by row. So a position is the state of the stream
    at the beginning of the block and the number of rows taken from the block, and resuming reads one block. It also
    has a digest of the block's first row, because some versions of ``datasets`` resume a stream at another row without
    an error.

    Args:
        open_stream: opens the stream. Each iteration opens it anew, because iterations over one stream share a state.
        seed: seed of all orders.
        block_size: rows in memory.
    """

    def __init__(self, open_stream: Callable[[], Any], seed: int, block_size: int) -> None:
        self.open_stream, self.seed, self.block_size = open_stream, seed, block_size

    def items(self, position: Position) -> Iterator[tuple[Position, Item]]:
        """See :class:`ItemSource`.

        Raises:
            UserError: if there are no rows, or the stream does not resume at the row of the position.
        """
        stream = self.open_stream()
        beginning = stream.state_dict()
        number, first, taken = (position.get(key, 0) for key in ("pass", "first", "taken"))
        state, expected = position.get("state", beginning), position.get("first_row")
        while True:
            stream.load_state_dict(state)
            rows = read_rows(stream)
            while block := list(itertools.islice(rows, self.block_size)):
                first_row = _digest(block[0])
                if expected not in (None, first_row):
                    raise UserError(_not_resumed(first))
                expected = None
                order = np.random.default_rng([self.seed, number, first]).permutation(len(block))
                for place in order[taken:]:
                    taken += 1
                    here = {"pass": number, "first": first, "taken": taken, "state": state, "first_row": first_row}
                    yield here, Item(number, first + int(place), block[place])
                first, taken, state = first + len(block), 0, stream.state_dict()
            if expected is not None:
                raise UserError(_not_resumed(first))
            if first == 0:
                raise UserError("the data stream is empty; check data.source, data.split and data.held_out")
            number, first, state = number + 1, 0, beginning


def _not_resumed(first: int) -> str:
    import datasets  # type: ignore[import-untyped]

    return (
        f"the data stream does not resume at row {first}, where the checkpoint left it: the data have changed, or "
        f"datasets {datasets.__version__} does not resume such a stream; restore the data, or install datasets 5.1 or "
        "newer"
    )


def _digest(row: Any) -> str:  # noqa: ANN401 - whatever columns the user's data have
    """Short hash of the plain values in a row."""
    return hashlib.blake2b(repr(_plain(row)).encode(), digest_size=8).hexdigest()


def _plain(value: Any) -> Any:  # noqa: ANN401 - as above
    """A value without its parts of other types, whose ``repr`` may have an address."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | bytes | bool | int | float) else None
