from itertools import islice

import pytest

from tests.data.stand_ins import ROWS, SOURCES, number, open_stream
from tokenlearn.data.sources import StreamedSource
from tokenlearn.errors import UserError


@pytest.mark.parametrize("kind", ["shuffled", "streamed"])
def test_a_pass_has_everything_once_in_another_order_each_time(kind):
    items = islice(SOURCES[kind]().items({}), 3 * ROWS)
    passes = [[], [], []]
    for _, item in items:
        passes[item.pass_number].append(number(item))
    assert all(sorted(one) == list(range(ROWS)) for one in passes)
    assert len({tuple(one) for one in passes} | {tuple(range(ROWS))}) == 4


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


def test_an_empty_stream_is_an_error():
    source = StreamedSource(lambda: open_stream().skip(ROWS), 0, 5)
    with pytest.raises(UserError, match="empty"):
        next(source.items({}))


class StaleStream:
    """A stream that resumes ``late`` rows after its position, as some versions of ``datasets`` do."""

    def __init__(self, late=0, changed=False):
        self.start, self.late, self.changed = 0, late, changed

    def state_dict(self):
        return {"start": self.start}

    def load_state_dict(self, state):
        self.start = state["start"] + (self.late if state["start"] else 0)

    def __iter__(self):
        for n in range(self.start, ROWS):
            self.start += 1
            yield {"image": {"bytes": bytes([n + self.changed]), "path": None}, "n": n, "object": object()}


@pytest.mark.parametrize("taken", [6, 9, 10, ROWS + 6])
def test_a_stream_that_does_not_resume_at_its_row_is_an_error(taken):
    position = list(islice(StreamedSource(StaleStream, 0, 5).items({}), taken))[-1][0]
    following = next(StreamedSource(StaleStream, 0, 5).items(position))
    assert following[0]["pass"] == position["pass"]
    for broken in (lambda: StaleStream(late=1), lambda: StaleStream(late=ROWS), lambda: StaleStream(changed=True)):
        with pytest.raises(UserError, match=rf"row {position['first']}, .* datasets \d") as raised:
            next(StreamedSource(broken, 0, 5).items(position))
        assert "\n" not in str(raised.value)
    assert next(StreamedSource(lambda: StaleStream(late=1), 0, 5).items({}))[0]["taken"] == 1


def test_positions_of_older_checkpoints_have_no_digest():
    positions = [position for position, _ in islice(StreamedSource(StaleStream, 0, 5).items({}), 8)]
    del positions[6]["first_row"]
    assert next(StreamedSource(StaleStream, 0, 5).items(positions[6]))[0] == positions[7]
