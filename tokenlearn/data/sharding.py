"""Endless streams of batches: the same global batches on any number of processes, resumable at any of them."""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from tokenlearn.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
Sample = TypeVar("Sample")
Batch = TypeVar("Batch")

Position = dict[str, Any]
"""Where a source is, in plain numbers, strings, lists and dictionaries; empty for the beginning."""

_MOST_SKIPPED_IN_A_ROW = 10_000


@dataclass(frozen=True, slots=True)
class Item:
    """What a sample is made of.

    Attributes:
        pass_number: how often the data have been gone through before.
        index: place in the data, from 0.
        row: the datum itself where it cannot be looked up by its index.
    """

    pass_number: int
    index: int
    row: Any = None


def items_below(count: int) -> Iterator[Item]:
    """The items of ``count`` data, once and in order."""
    return (Item(0, index) for index in range(count))


class Skipped(NamedTuple):
    """An item that gives no sample.

    Attributes:
        name: what users know it by.
        reason: why.
    """

    name: str
    reason: str


class ItemSource(Protocol):
    """Endless items in an order that depends on nothing but the source."""

    def items(self, position: Position) -> Iterator[tuple[Position, Item]]:
        """Items from ``position`` on, each with the position behind it."""


class CountingSource:
    """Indices 0, 1, 2 and so on, none twice."""

    def items(self, position: Position) -> Iterator[tuple[Position, Item]]:
        """See :class:`ItemSource`."""
        for index in itertools.count(position.get("taken", 0)):
            yield {"taken": index + 1}, Item(0, index)


class ShuffledSource:
    """Indices below ``size`` in passes, each pass in an order of its own; every pass has every index once.

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

    A block, unlike a reservoir that is refilled row by row, is there again after reading it again. So a position is
    the state of the stream where the block begins and the number of rows taken from it, and resuming reads one block.

    Args:
        open_stream: opens the stream. Each iteration opens its own, because iterations over one stream share a state.
        seed: seed of all orders.
        block_size: rows in memory.
    """

    def __init__(self, open_stream: Callable[[], Any], seed: int, block_size: int) -> None:
        self.open_stream, self.seed, self.block_size = open_stream, seed, block_size

    def items(self, position: Position) -> Iterator[tuple[Position, Item]]:
        """See :class:`ItemSource`.

        Raises:
            UserError: if there are no rows.
        """
        stream = self.open_stream()
        beginning = stream.state_dict()
        number, first, taken = (position.get(key, 0) for key in ("pass", "first", "taken"))
        state = position.get("state", beginning)
        while True:
            stream.load_state_dict(state)
            rows = iter(stream)
            while block := list(itertools.islice(rows, self.block_size)):
                order = np.random.default_rng([self.seed, number, first]).permutation(len(block))
                for place in order[taken:]:
                    taken += 1
                    here = {"pass": number, "first": first, "taken": taken, "state": state}
                    yield here, Item(number, first + int(place), block[place])
                first, taken, state = first + len(block), 0, stream.state_dict()
            if first == 0:
                raise UserError("the data stream is empty; check data.source, data.split and the images held out")
            number, first, state = number + 1, 0, beginning


def ahead(function: Callable[[T], R], items: Iterable[T], workers: int, depth: int) -> Iterator[R]:
    """``map(function, items)`` in order, computed by threads in advance.

    Args:
        function: what to apply; it must be safe to call from several threads.
        items: what to apply it to; it is iterated over by the caller's thread alone.
        workers: number of threads; without any, each result is computed when it is asked for.
        depth: results to compute in advance.

    Yields:
        Results in the order of the items.
    """
    if workers == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers)
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # Without waiting: an iterator that nobody needs is closed by the garbage collector, at any time and in any
        # thread, even in one that is being started, which holds a lock that waiting for threads takes.
        pool.shutdown(wait=False, cancel_futures=True)


class BatchStream(Generic[Sample, Batch]):
    """An endless stream of training batches, cut into epochs of ``length`` batches; a loader for Lightning.

    A global batch is the next ``world_size * batch_size`` samples of the source, of which each rank takes its part.
    So all batches are full, one process and several see the same global batches, and a pass over the data ends where
    it ends: in the middle of a global batch if need be, which the next pass fills up. The position that Lightning
    saves is that behind the last global batch that was handed out, the same on all ranks, whatever was read ahead.

    Args:
        source: items in order.
        load: makes a sample of an item, or says why it is skipped; pure, since threads call it in any order.
        collate: makes a batch of ``batch_size`` samples.
        batch_size: samples per batch and rank.
        length: batches per epoch and rank.
        rank: this process among ``world_size``.
        world_size: number of processes.
        num_workers: threads that load ahead.
        may_skip: whether ``load`` may skip items. Then each rank loads the items of all ranks, because what a rank's
            samples are depends on what was skipped before.
    """

    def __init__(
        self,
        source: ItemSource,
        load: Callable[[Item], Sample | Skipped],
        collate: Callable[[Sequence[Sample]], Batch],
        batch_size: int,
        length: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        may_skip: bool = False,
    ) -> None:
        self.source, self.load, self.collate = source, load, collate
        self.batch_size, self.length, self.num_workers = batch_size, length, num_workers
        self.rank, self.world_size, self.may_skip = rank, world_size, may_skip
        self.batches_taken = 0
        self._position: Position = {}
        self._loaded: Iterator[tuple[Position, Sample | Skipped | None]] | None = None
        self._skipped: list[Skipped] = []

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch."""
        while True:
            batch = self._next_batch()
            if self.batches_taken % self.length == 0:
                if self.rank == 0:  # all ranks have skipped the same
                    _warn_of(self._skipped)
                self._skipped = []
            yield batch
            if self.batches_taken % self.length == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        """Position, which Lightning keeps in checkpoints."""
        return {"batches_taken": self.batches_taken, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved position."""
        self.batches_taken, self._position = state["batches_taken"], state["position"]
        self._loaded = None

    def _next_batch(self) -> Batch:
        if self._loaded is None:
            items = enumerate(self.source.items(self._position))
            self._loaded = ahead(self._load, items, self.num_workers, 2 * self.world_size * self.batch_size)
        own: list[Sample] = []
        position, count, in_a_row = self._position, 0, 0
        while count < self.world_size * self.batch_size:
            position, sample = next(self._loaded)
            if isinstance(sample, Skipped):
                self._skipped.append(sample)
                in_a_row += 1
                if in_a_row == _MOST_SKIPPED_IN_A_ROW:
                    raise UserError(f"none of {in_a_row} pictures can be used, such as {_described(sample)}")
                continue
            in_a_row = 0
            if self._is_own(count):
                assert sample is not None
                own.append(sample)
            count += 1
        self._position = position
        self.batches_taken += 1
        return self.collate(own)

    def _load(self, numbered: tuple[int, tuple[Position, Item]]) -> tuple[Position, Sample | Skipped | None]:
        number, (position, item) = numbered
        return position, self.load(item) if self.may_skip or self._is_own(number) else None

    def _is_own(self, number: int) -> bool:
        return number // self.batch_size % self.world_size == self.rank


class EvaluationBatches(Generic[Sample, Batch]):
    """This rank's part of some items, once, in batches; every ``world_size``-th item is this rank's.

    Args:
        items: the items of all ranks, in order.
        count: number of items; None if it is not known.
        load: as in :class:`BatchStream`.
        collate: as in :class:`BatchStream`; the last batch may be smaller.
        batch_size: samples per batch.
        rank: this process among ``world_size``.
        world_size: number of processes.
        num_workers: threads that load ahead.

    Raises:
        UserError: if there are fewer items than processes.
    """

    def __init__(
        self,
        items: Callable[[], Iterable[Item]],
        count: int | None,
        load: Callable[[Item], Sample | Skipped],
        collate: Callable[[Sequence[Sample]], Batch],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        # Lightning skips a process without batches, and the others would wait for it.
        if count is not None and count < world_size:
            raise UserError(f"{count} images cannot be split among {world_size} devices; lower trainer.devices")
        self.items, self.count, self.load, self.collate = items, count, load, collate
        self.batch_size, self.num_workers = batch_size, num_workers
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        if self.count is None:
            raise TypeError("the number of items is not known")
        return -(-len(range(self.rank, self.count, self.world_size)) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        own = itertools.islice(self.items(), self.rank, None, self.world_size)
        samples: list[Sample] = []
        skipped: list[Skipped] = []
        try:
            for sample in ahead(self.load, own, self.num_workers, 2 * self.batch_size):
                if isinstance(sample, Skipped):
                    skipped.append(sample)
                    continue
                samples.append(sample)
                if len(samples) == self.batch_size:
                    yield self.collate(samples)
                    samples = []
            if samples:
                yield self.collate(samples)
        finally:  # whoever iterates may know the number of batches and not ask for what comes after the last
            _warn_of(skipped)


def _described(skipped: Skipped) -> str:
    return f"'{skipped.name}' ({skipped.reason})"


def _warn_of(skipped: Sequence[Skipped]) -> None:
    if skipped:
        warnings.warn(
            f"skipped {len(skipped)} pictures that cannot be used, such as {_described(skipped[0])}", stacklevel=3
        )
