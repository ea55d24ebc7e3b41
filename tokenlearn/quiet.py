"""Silence for messages of libraries that do not apply here, for the time of a block."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

_WARNINGS = (
    ".*does not have many workers.*",  # batches are prompts and seeds: workers have nothing to prefetch
    ".*infer the batch indices.*",  # only callbacks that use a sample's place in its data set need them
    ".*LeafSpec.*is deprecated.*",  # Lightning's own code, which users cannot change
    ".*module\\(s\\) in eval mode.*",  # the frozen models are in eval mode on purpose
)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide advice of Lightning that does not apply here, and what :func:`quiet_models` hides.

    Warning filters, log levels and progress bars are as before after the block.
    """
    lightning = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lightning.addFilter(_applies)
    try:
        with quiet_models(), warnings.catch_warnings():
            for message in _WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        lightning.removeFilter(_applies)


@contextmanager
def quiet_models() -> Iterator[None]:
    """Hide the loading bars and warnings of diffusers and transformers."""
    libraries = [import_module(f"{name}.utils.logging") for name in ("diffusers", "transformers")]
    before = [(library, library.is_progress_bar_enabled(), library.get_verbosity()) for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, had_bars, verbosity in before:
            library.set_verbosity(verbosity)
            if had_bars:
                library.enable_progress_bar()


def _applies(record: logging.LogRecord) -> bool:
    """False for Lightning's advertisement of another logger."""
    return "litlogger" not in str(record.msg)
