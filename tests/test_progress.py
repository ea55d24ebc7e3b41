"""Signs of life: lines about every thirty seconds where there is no terminal, a bar where there is one."""

import io

import pytest

from tokenlearn.progress import Meter, duration, progress, progress_line


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


def test_a_line_about_every_thirty_seconds(clock):
    stream = io.StringIO()
    with Meter("Training", 60, stream=stream, clock=clock) as meter:
        for _ in range(60):
            clock.now += 7
            meter.update(figures="loss 0.5")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 12  # 35 seconds apart, 420 in all
    assert lines[0] == "Training: 5 of 60 steps, 35 s, about 6 min left, loss 0.5"
    assert lines[-1] == "Training: 60 of 60 steps, 7 min, about 0 s left, loss 0.5"
    assert "\r" not in stream.getvalue()


def test_short_work_says_nothing(clock):
    stream = io.StringIO()
    with Meter("Training", 3, stream=stream, clock=clock) as meter:
        for _ in range(3):
            clock.now += 9
            meter.update()
    assert not stream.getvalue()


def test_parts_of_a_long_unit_are_a_sign_of_life(clock):
    stream = io.StringIO()
    meter = Meter("Prediction", 1, unit="batch", stream=stream, clock=clock)
    for _ in range(100):
        clock.now += 1
        meter.beat("network evaluation")
    assert stream.getvalue().splitlines() == [
        "Prediction: 0 of 1 batch, 30 s, 30 network evaluations into the next",
        "Prediction: 0 of 1 batch, 60 s, 60 network evaluations into the next",
        "Prediction: 0 of 1 batch, 2 min, 90 network evaluations into the next",
    ]


def test_a_resumed_run_tells_its_own_pace(clock):
    stream = io.StringIO()
    meter = Meter("Training", 100, done=80, stream=stream, clock=clock)
    clock.now += 40
    meter.update(10)
    assert stream.getvalue() == "Training: 90 of 100 steps, 40 s, about 40 s left\n"


def test_a_terminal_has_a_bar(clock):
    stream = Terminal()
    with Meter("Training", 2, stream=stream, clock=clock) as meter:
        meter.update(figures="loss 0.5")
        meter.update()
    assert "Training" in stream.getvalue()
    assert "\r" in stream.getvalue()


def test_nothing_is_shown_where_nothing_should_be(clock):
    stream = Terminal()
    with Meter("Training", 2, shown=False, stream=stream, clock=clock) as meter:
        clock.now += 99
        meter.update()
        meter.beat("evaluation")
    assert not stream.getvalue()


def test_progress_goes_through_items_once():
    assert list(progress(range(3), "Trying")) == [0, 1, 2]
    assert list(progress(iter("ab"), "Trying", total=2)) == ["a", "b"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (36000, "10.0 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("done", "total", "measured", "line"),
    [
        (20, 60, 20, "Trying: 20 of 60 steps, 10 min, about 20 min left"),
        (0, 60, 0, "Trying: 0 of 60 steps, 10 min"),
        (20, None, 20, "Trying: 20 steps, 10 min"),
    ],
)
def test_progress_line(done, total, measured, line):
    assert progress_line("Trying", done, total, "step", 600, measured) == line
