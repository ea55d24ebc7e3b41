"""Streams of batches: the same global batches on any number of processes, resumable at any of them."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from tokenlearn.data.prefetch import prefetch
from tokenlearn.data.sources import Item, ItemSource, Position, Skipped
from tokenlearn.errors import UserError

Sample = TypeVar("Sample")
Batch = TypeVar("Batch")

_MOST_SKIPPED_IN_A_ROW = 1000


class BatchStream(Generic[Sample, Batch]):
    """An endless stream of training batches, cut into epochs of ``length`` batches; a loader for Lightning.

    A global batch is the next ``world_size * batch_size`` samples of the source, of which each rank takes its part.
    So all batches are full, one process and several see the same global batches, and a pass over the data may end
    within a global batch, which the next pass fills up. The position that Lightning saves is behind the last global
    batch that was handed out, the same on all ranks, however many items were prefetched.

    Args:
        source: items in order.
        load: makes a sample of an item, or says why it is skipped; pure, since threads call it in any order.
        collate: makes a batch of ``batch_size`` samples.
        batch_size: samples per batch and rank.
        length: batches per epoch and rank.
        rank: this process among ``world_size``.
        world_size: number of processes.
        num_workers: threads that load in advance.
        may_skip: whether ``load`` may skip items. Then each rank loads the items of all ranks, because its samples
            depend on the items skipped before.
    """

    def __init__(
        self,
        source: ItemSource,
        load: Callable[[Item], Sample | Skipped],
        collate: Callable[[Sequence[Sample]], Batch],
        *,
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
        self._loaded: Iterator[tuple[Position, Sample | Skipped | None, int]] | None = None
        self._skipped: list[Skipped] = []

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch."""
        while True:
            batch = self._next_batch()
            if self.batches_taken % self.length == 0:
                if self.rank == 0:  # all ranks have skipped the same items
                    warn_of(self._skipped)
                self._skipped = []
            yield batch
            if self.batches_taken % self.length == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        """The position, which Lightning saves in checkpoints."""
        return {"batches_taken": self.batches_taken, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at a saved position."""
        self.batches_taken = state["batches_taken"]
        # Checkpoints of prompts once had nothing but the number of batches.
        taken = {"taken": self.batches_taken * self.world_size * self.batch_size}
        self._position = state.get("position", taken)
        self._loaded = None

    def _next_batch(self) -> Batch:
        if self._loaded is None:
            items = enumerate(self.source.items(self._position))
            depth = 2 * self.world_size * self.batch_size
            self._loaded = prefetch(self._load, items, workers=self.num_workers, depth=depth)
        samples: list[Sample] = []
        position, count, in_a_row, first_pass = self._position, 0, 0, 0
        while count < self.world_size * self.batch_size:
            position, sample, pass_number = next(self._loaded)
            if isinstance(sample, Skipped):
                self._skipped.append(sample)
                in_a_row += 1
                first_pass = pass_number if in_a_row == 1 else first_pass
                if in_a_row == _MOST_SKIPPED_IN_A_ROW or pass_number > first_pass + 1:  # a whole pass between them
                    raise UserError(
                        f"none of {in_a_row} images in a row can be used, such as {_described(sample)}; remove or "
                        "replace them, or check data.source"
                    )
                continue
            in_a_row = 0
            if self._is_of_rank(count):
                assert sample is not None
                samples.append(sample)
            count += 1
        self._position = position
        self.batches_taken += 1
        return self.collate(samples)

    def _load(self, numbered: tuple[int, tuple[Position, Item]]) -> tuple[Position, Sample | Skipped | None, int]:
        number, (position, item) = numbered
        sample = self.load(item) if self.may_skip or self._is_of_rank(number) else None
        return position, sample, item.pass_number

    def _is_of_rank(self, number: int) -> bool:
        return number // self.batch_size % self.world_size == self.rank


class EvaluationBatches(Generic[Sample, Batch]):
    """This rank's part of finitely many items, once, in batches; a rank has every ``world_size``-th item.

    Args:
        items: gives the items of all ranks, in order.
        count: number of items; None if it is not known.
        load: as in :class:`BatchStream`.
        collate: as in :class:`BatchStream`; the last batch may be smaller.
        batch_size: samples per batch.
        rank: this process among ``world_size``.
        world_size: number of processes.
        num_workers: threads that load in advance.
        in_place_of: makes the sample that takes the place of a skipped item, so that the number of batches does not
            depend on the items; None to leave skipped items out.

    Attributes:
        skipped: this rank's skipped items of the last iteration. The only process warns of them itself; of several,
            :class:`tokenlearn.data.skipped_images.SkippedImages` warns once of those of all.

    Raises:
        UserError: if there are fewer items than processes; or in the iteration of the only process, if all items are
            skipped and something takes their place.
    """

    def __init__(
        self,
        items: Callable[[], Iterable[Item]],
        count: int | None,
        load: Callable[[Item], Sample | Skipped],
        collate: Callable[[Sequence[Sample]], Batch],
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        in_place_of: Callable[[Skipped], Sample] | None = None,
    ) -> None:
        # Lightning skips a process without batches, and the others would wait for it.
        if count is not None and count < world_size:
            raise UserError(f"{count} images cannot be split among {world_size} devices; lower trainer.devices")
        self.items, self.count, self.load, self.collate = items, count, load, collate
        self.batch_size, self.num_workers, self.in_place_of = batch_size, num_workers, in_place_of
        self.rank, self.world_size = rank, world_size
        self.skipped: list[Skipped] = []

    def __len__(self) -> int:
        if self.count is None:
            raise TypeError("the number of items is not known")
        return -(-len(range(self.rank, self.count, self.world_size)) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        items = itertools.islice(self.items(), self.rank, None, self.world_size)
        samples: list[Sample] = []
        skipped = self.skipped = []
        try:
            for sample in prefetch(self.load, items, workers=self.num_workers, depth=2 * self.batch_size):
                if isinstance(sample, Skipped):
                    skipped.append(sample)
                    if self.in_place_of is None:
                        continue
                    if self.world_size == 1 and len(skipped) == self.count:
                        raise UserError(
                            f"none of {len(skipped)} images can be used, such as {_described(skipped[0])}; remove or "
                            "replace them"
                        )
                    sample = self.in_place_of(sample)
                samples.append(sample)
                if len(samples) == self.batch_size:
                    yield self.collate(samples)
                    samples = []
            if samples:
                yield self.collate(samples)
        finally:  # a caller that knows the number of batches does not ask for what follows the last one
            if self.world_size == 1:
                warn_of(skipped)


def _described(skipped: Skipped) -> str:
    return f"'{skipped.name}' ({skipped.reason})"


def warn_of(skipped: Sequence[Skipped]) -> None:
    """Warn of skipped items, if there are any, naming the first."""
    if skipped:
        warnings.warn(
            f"skipped {len(skipped)} images that cannot be used, such as {_described(skipped[0])}; remove or replace "
            "them",
            stacklevel=3,
        )
