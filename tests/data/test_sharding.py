import threading
import warnings
from itertools import chain, islice

import datasets
import pytest

from tokenlearn.data.sharding import (
    BatchStream,
    CountingSource,
    EvaluationBatches,
    Item,
    ShuffledSource,
    Skipped,
    StreamedSource,
    ahead,
)
from tokenlearn.errors import UserError

ROWS = 23


def open_stream():
    return datasets.Dataset.from_dict({"n": range(ROWS)}).to_iterable_dataset(num_shards=3)


def number(item):
    value = item.index if item.row is None else item.row["n"]
    assert item.row is None or item.index == value
    return value


def number_but_not_sevens(item):
    value = number(item)
    return Skipped(f"picture {value}", "a seven") if value % 7 == 0 else value


SOURCES = {
    "counting": CountingSource,
    "shuffled": lambda: ShuffledSource(ROWS, seed=3),
    "streamed": lambda: StreamedSource(open_stream, seed=3, block_size=5),
}


def loader(kind, batch_size=4, length=3, load=number, **options):
    return BatchStream(SOURCES[kind](), load, list, batch_size, length, **options)


def epochs(stream, count):
    return [list(stream) for _ in range(count)]


@pytest.mark.parametrize("kind", ["shuffled", "streamed"])
def test_a_pass_has_everything_once_in_another_order_each_time(kind):
    items = islice(SOURCES[kind]().items({}), 3 * ROWS)
    passes = [[], [], []]
    for _, item in items:
        passes[item.pass_number].append(number(item))
    assert all(sorted(one) == list(range(ROWS)) for one in passes)
    assert len({tuple(one) for one in passes} | {tuple(range(ROWS))}) == 4


def test_counting_has_nothing_twice():
    assert list(chain.from_iterable(chain.from_iterable(epochs(loader("counting"), 3)))) == list(range(36))


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("load", [number, number_but_not_sevens])
@pytest.mark.filterwarnings("ignore:skipped")
def test_two_ranks_together_equal_one_process(kind, load):
    may_skip = load is number_but_not_sevens
    whole = epochs(loader(kind, batch_size=4, load=load, may_skip=may_skip), 4)
    parts = [
        epochs(loader(kind, batch_size=2, load=load, may_skip=may_skip, rank=rank, world_size=2), 4)
        for rank in range(2)
    ]
    for one, first, second in zip(whole, *parts, strict=True):
        assert len(one) == len(first) == len(second) == 3
        assert one == [a + b for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("kind", SOURCES)
def test_workers_change_nothing(kind):
    assert epochs(loader(kind, num_workers=3), 4) == epochs(loader(kind), 4)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("taken", [1, 2, 3, 7])
@pytest.mark.filterwarnings("ignore:skipped")
def test_any_rank_resumes_at_the_position_that_rank_0_saved(kind, taken):
    """Whatever the threads have read ahead; in the middle and at the end of an epoch, and in a later pass."""
    options = {"num_workers": 2, "load": number_but_not_sevens, "may_skip": True, "batch_size": 2, "world_size": 2}
    saved = loader(kind, rank=0, **options)
    list(islice(chain.from_iterable(epochs_forever(saved)), taken))
    state = saved.state_dict()
    for rank in range(2):
        uninterrupted = loader(kind, rank=rank, **options)
        everything = list(islice(chain.from_iterable(epochs_forever(uninterrupted)), 15))
        resumed = loader(kind, rank=rank, **options)
        resumed.load_state_dict(state)
        rest = list(resumed)
        assert len(rest) == 3 - taken % 3
        rest += chain.from_iterable(epochs(resumed, 2))
        assert rest == everything[taken : taken + len(rest)]


def epochs_forever(stream):
    while True:
        yield stream


def test_a_position_is_plain_data():
    stream = loader("streamed")
    list(stream)

    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(one) for key, one in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or type(value) in (int, str, bool)

    assert plain(stream.state_dict())


def test_a_resumed_stream_reads_its_block_again_and_no_more():
    read = []

    def rows(shards):
        for shard in shards:
            for n in range(5 * shard, 5 * shard + 5):
                read.append(n)
                yield {"n": n}

    class Stream:
        """The state of a ``datasets`` stream without its machinery."""

        start = 0

        def state_dict(self):
            return {"start": self.start}

        def load_state_dict(self, state):
            self.start = state["start"]

        def __iter__(self):
            for row in rows(range(self.start // 5, 8)):
                self.start += 1
                yield row

    source = StreamedSource(Stream, 0, 5)
    everything = list(islice(source.items({}), 40))
    position = everything[31][0]
    read.clear()
    following = list(islice(source.items(position), 8))
    assert [item for _, item in following] == [item for _, item in everything[32:40]]
    assert read == list(range(30, 40))


def test_skipped_items_are_counted_in_one_warning_per_epoch():
    stream = loader("shuffled", load=number_but_not_sevens, may_skip=True, batch_size=5, length=4)
    message = r"skipped [34] pictures that cannot be used, such as 'picture .*' \(a seven\)"
    with pytest.warns(UserWarning, match=message) as seen:
        taken = list(chain.from_iterable(stream))
    assert len(seen) == 1
    assert len(taken) == 20
    assert not any(value % 7 == 0 for value in taken)
    other = loader("shuffled", load=number_but_not_sevens, may_skip=True, rank=1, world_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(other)


def test_the_warning_does_not_wait_for_a_batch_too_many():
    """Lightning asks for as many batches as there are, and no more."""
    stream = loader("shuffled", load=number_but_not_sevens, may_skip=True, batch_size=ROWS, length=1)
    with pytest.warns(UserWarning, match="skipped"):
        next(iter(stream))


def test_nothing_but_broken_pictures_is_an_error(monkeypatch):
    monkeypatch.setattr("tokenlearn.data.sharding._MOST_SKIPPED_IN_A_ROW", 50)
    stream = loader("shuffled", load=lambda item: Skipped("a.png", "cut off"), may_skip=True)
    with pytest.raises(UserError, match=r"none of 50 pictures can be used, such as 'a.png' \(cut off\)"):
        list(stream)


def test_an_empty_stream_is_an_error():
    source = StreamedSource(lambda: open_stream().skip(ROWS), 0, 5)
    with pytest.raises(UserError, match="stream is empty"):
        next(source.items({}))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_split_without_overlap(workers):
    def part(rank, world_size):
        batches = EvaluationBatches(
            lambda: (Item(0, n) for n in range(ROWS)), ROWS, number, list, 4, rank, world_size, workers
        )
        taken = list(batches)
        assert len(taken) == len(batches)
        assert all(len(batch) == 4 for batch in taken[:-1])
        return list(chain.from_iterable(taken))

    assert part(0, 1) == list(range(ROWS))
    assert sorted(chain.from_iterable(part(rank, 3) for rank in range(3))) == list(range(ROWS))


def test_evaluation_skips_with_one_warning():
    items = lambda: (Item(0, n) for n in range(ROWS))  # noqa: E731
    with pytest.warns(UserWarning, match="skipped 4 pictures") as seen:
        taken = list(EvaluationBatches(items, ROWS, number_but_not_sevens, list, 4))
    assert len(seen) == 1
    assert [len(batch) for batch in taken] == [4, 4, 4, 4, 3]


def test_more_devices_than_images_are_refused():
    with pytest.raises(UserError, match="1 images cannot be split among 2 devices"):
        EvaluationBatches(list, 1, number, list, 4, 1, 2)


def test_ahead_keeps_the_order_and_hands_on_errors():
    assert list(ahead(str, range(50), 4, 7)) == list(map(str, range(50)))
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda n: 1 // (5 - n), range(50), 4, 7))


def test_closing_what_is_read_ahead_waits_for_no_thread():
    working, done = threading.Event(), threading.Event()

    def load(number):
        if number == 1:
            working.set()
            done.wait(20)
        return number

    stream = ahead(load, range(5), 1, 2)
    assert next(stream) == 0
    assert working.wait(20)
    closing = threading.Thread(target=stream.close)
    closing.start()
    closing.join(5)
    waits = closing.is_alive()
    done.set()
    closing.join()
    assert not waits
