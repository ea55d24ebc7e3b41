"""Images while they form: the clean images that the model predicts at its steps, handed from a sampler to an iterator.

Samplers are loops, and a page wants to draw what it has between two steps, or to stop. So the sampler runs in a thread
of its own and hands images over.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from PIL import Image
from torch import Tensor

from tokenlearn.diffusion import Inverted
from tokenlearn.editing import ImageEditor
from tokenlearn.guidance import GuidedModel
from tokenlearn.models import Conditioning
from tokenlearn.pipeline import to_images

T = TypeVar("T")

INTERVAL = 0.25
"""Seconds between previews."""
_SHARE = 5  # decoding previews takes at most one part in five of the time, also where the decoder is slow

Report = Callable[[Callable[[], Tensor]], None]
"""Called at each step with a function that gives the clean latents (B, C, h, w) which the model predicts there."""


class _Closed(Exception):
    """Nobody waits for the result any more."""


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None


class Handover(Generic[T]):
    """Where a function puts values for the iterator that :func:`handed_over` gives."""

    def __init__(self) -> None:
        self._values: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        self._closed = threading.Event()

    def put(self, value: T) -> None:
        """Hand over a value; it ends the function if the iterator is closed."""
        self.check()
        self._values.put(value)

    def check(self) -> None:
        """End the function if the iterator is closed."""
        if self._closed.is_set():
            raise _Closed

    def run(self, function: Callable[[Handover[T]], None]) -> None:
        """Run the function, and hand over its end or its error."""
        try:
            function(self)
        except _Closed:
            pass
        except BaseException as error:  # the iterator raises it
            self._values.put(_End(error))
        else:
            self._values.put(_End())

    def values(self) -> Iterator[T]:
        """The values until the function ends."""
        while not isinstance(value := self._values.get(), _End):
            yield value
        if value.error is not None:
            raise value.error

    def close(self) -> None:
        """Tell the function to end."""
        self._closed.set()


def handed_over(function: Callable[[Handover[T]], None]) -> Iterator[T]:
    """Iterate over the values that a function hands over while it runs in a thread.

    Closing the iterator ends the function where it next hands something over or looks, and waits for that.

    Args:
        function: takes a :class:`Handover`.
    """
    handover: Handover[T] = Handover()
    thread = threading.Thread(target=handover.run, args=(function,), daemon=True)
    thread.start()
    try:
        yield from handover.values()
    finally:
        handover.close()
        thread.join()


class Previews:
    """Shows predicted images at intervals, and looks at every step whether anybody still waits.

    Args:
        check: raises where nobody waits any more.
        decode: latents (1, C, h, w) to images (1, 3, H, W).
        show: takes a preview.
        interval: seconds between previews; more where decoding takes long.
    """

    def __init__(
        self,
        check: Callable[[], None],
        decode: Callable[[Tensor], Tensor],
        show: Callable[[Image.Image], None],
        interval: float = INTERVAL,
    ) -> None:
        self._check, self._decode, self._show, self._interval = check, decode, show, interval
        self._due = time.monotonic() + interval

    def __call__(self, clean: Callable[[], Tensor]) -> None:
        """Show a preview if it is time; see :data:`Report`."""
        self._check()
        began = time.monotonic()
        if began < self._due:
            return
        self._show(to_images(self._decode(clean()))[0])
        ended = time.monotonic()
        self._due = ended + max(self._interval, (_SHARE - 1) * (ended - began))


class WatchedModel(GuidedModel[Conditioning]):
    """A guided model that reports the clean latents it predicts at each step."""

    def __init__(self, model: GuidedModel[Conditioning], report: Report) -> None:
        super().__init__(model.backbone, model.rule, model.conditionings)
        self._report = report

    def __call__(self, latents: Tensor, timestep: Tensor, step: int, recompute: bool = False) -> Tensor:
        """See :class:`GuidedModel`."""
        prediction = super().__call__(latents, timestep, step, recompute)
        self._report(lambda: self.process.x0(latents, prediction, timestep))
        return prediction


class WatchedEditor(ImageEditor):
    """An editor that can report the clean latents predicted at each step of denoising."""

    _report: Report | None = None

    @contextmanager
    def watched(self, report: Report) -> Iterator[None]:
        """Report while it is entered."""
        self._report = report
        try:
            yield
        finally:
            self._report = None

    def denoise(self, noisy: Inverted, model: GuidedModel[Conditioning]) -> Tensor:
        """See :class:`ImageEditor`."""
        return super().denoise(noisy, model if self._report is None else WatchedModel(model, self._report))
