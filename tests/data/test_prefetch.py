import threading

import pytest

from tokenlearn.data.prefetch import prefetch


def test_prefetching_keeps_the_order_and_hands_on_errors():
    assert list(prefetch(str, range(50), workers=4, depth=7)) == list(map(str, range(50)))
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda n: 1 // (5 - n), range(50), workers=4, depth=7))


def test_closing_waits_for_no_thread():
    working, done = threading.Event(), threading.Event()

    def load(number):
        if number == 1:
            working.set()
            done.wait(20)
        return number

    stream = prefetch(load, range(5), workers=1, depth=2)
    assert next(stream) == 0
    assert working.wait(20)
    closing = threading.Thread(target=stream.close)
    closing.start()
    closing.join(5)
    waits = closing.is_alive()
    done.set()
    closing.join()
    assert not waits
