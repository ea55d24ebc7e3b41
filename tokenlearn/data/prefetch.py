"""Loading by threads in advance of the training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetch(function: Callable[[T], R], items: Iterable[T], *, workers: int, depth: int) -> Iterator[R]:
    """``map(function, items)`` in order, computed by threads in advance.

    Args:
        function: function to apply; it must be safe to call from several threads.
        items: its arguments; only the caller's thread iterates over them.
        workers: number of threads; with 0, each result is computed when it is asked for.
        depth: number of results to compute in advance.

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
        # Without waiting: the garbage collector closes an abandoned iterator at any time and in any thread, even in
        # one that is being started, which holds a lock that waiting for threads takes.
        pool.shutdown(wait=False, cancel_futures=True)
