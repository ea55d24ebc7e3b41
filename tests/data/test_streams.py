import warnings
from itertools import chain, islice

import pytest

from tests.data.stand_ins import ROWS, SOURCES, number
from tokenlearn.data.sources import Item, Skipped
from tokenlearn.data.streams import BatchStream, EvaluationBatches
from tokenlearn.errors import UserError


def number_but_not_sevens(item):
    value = number(item)
    return Skipped(f"image {value}", "a seven") if value % 7 == 0 else value


def loader(kind, batch_size=4, length=3, load=number, **options):
    return BatchStream(SOURCES[kind](), load, list, batch_size=batch_size, length=length, **options)


def epochs(stream, count):
    return [list(stream) for _ in range(count)]


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


def test_skipped_items_are_counted_in_one_warning_per_epoch():
    stream = loader("shuffled", load=number_but_not_sevens, may_skip=True, batch_size=5, length=4)
    message = r"skipped [34] .*'image .*' \(a seven\)"
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


@pytest.mark.parametrize(("most", "found"), [(30, 30), (1000, 2 * ROWS + 1)])
def test_nothing_but_broken_images_is_an_error(monkeypatch, most, found):
    """After a number of images in a row, or once none of a whole pass could be used."""
    monkeypatch.setattr("tokenlearn.data.streams._MOST_SKIPPED_IN_A_ROW", most)
    stream = loader("shuffled", load=lambda item: Skipped("a.png", "cut off"), may_skip=True)
    with pytest.raises(UserError, match=rf"none of {found} .*'a.png' \(cut off\)"):
        list(stream)


def test_one_image_that_can_be_used_is_enough():
    stream = loader(
        "shuffled", load=lambda item: number(item) if number(item) == 3 else Skipped("a", ""), may_skip=True
    )
    with pytest.warns(UserWarning, match="skipped"):
        assert {int(value) for batch in stream for value in batch} == {3}


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_split_without_overlap(workers):
    def part(rank, world_size):
        batches = EvaluationBatches(
            lambda: (Item(0, n) for n in range(ROWS)),
            ROWS,
            number,
            list,
            batch_size=4,
            rank=rank,
            world_size=world_size,
            num_workers=workers,
        )
        taken = list(batches)
        assert len(taken) == len(batches)
        assert all(len(batch) == 4 for batch in taken[:-1])
        return list(chain.from_iterable(taken))

    assert part(0, 1) == list(range(ROWS))
    assert sorted(chain.from_iterable(part(rank, 3) for rank in range(3))) == list(range(ROWS))


def test_evaluation_skips_with_one_warning():
    items = lambda: (Item(0, n) for n in range(ROWS))  # noqa: E731
    with pytest.warns(UserWarning, match="skipped 4 ") as seen:
        taken = list(EvaluationBatches(items, ROWS, number_but_not_sevens, list, batch_size=4))
    assert len(seen) == 1
    assert [len(batch) for batch in taken] == [4, 4, 4, 4, 3]


def test_more_devices_than_images_are_refused():
    with pytest.raises(UserError, match=r"1 .* 2 "):
        EvaluationBatches(list, 1, number, list, batch_size=4, rank=1, world_size=2)


def test_checkpoints_of_prompts_that_have_only_the_number_of_batches_resume():
    options = {"batch_size": 2, "world_size": 2, "rank": 1}
    everything = list(islice(chain.from_iterable(epochs_forever(loader("counting", **options))), 9))
    resumed = loader("counting", **options)
    resumed.load_state_dict({"batches_taken": 4})
    assert list(chain.from_iterable(epochs(resumed, 2)))[:5] == everything[4:]
