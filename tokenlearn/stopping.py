"""Ctrl-C and SIGTERM as requests to stop after the current step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(SystemExit):
    """A signal ended the run; the exit code is 128 and the signal's number, as shells report it.

    Args:
        received: the signal.
        message: what is finished and how to continue, in one line.
    """

    def __init__(self, received: signal.Signals, message: str = "the run had not begun") -> None:
        super().__init__(128 + received)
        self.received = received
        self.message = f"stopped by {_NAMES[received]}: {message}"


class StopSignals:
    """While it is entered, Ctrl-C and SIGTERM stop the run: within a step when the step is done, elsewhere at once.

    The trainer looks for a SIGTERM between steps, so Ctrl-C within a step is handed on as one. A second Ctrl-C does
    not wait. Processes that another process of the run has started leave Ctrl-C to the one that started them.

    Attributes:
        received: the first signal, None before.
        in_steps: whether a loop runs that looks for SIGTERM between its steps.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.in_steps = False
        self._handing_on = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # signals can be handled nowhere else
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if self._handing_on or (received == signal.SIGINT and os.environ.get("LOCAL_RANK", "0") != "0"):
            return
        impatient = self.received is not None and received == signal.SIGINT
        self.received = self.received or received
        if impatient or not self.in_steps:
            raise Stopped(self.received)
        if received == signal.SIGINT:
            self._handing_on = True
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                self._handing_on = False
