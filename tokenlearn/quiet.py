"""Silence for messages of libraries that do not apply here, for the time of a block."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module

_WARNINGS = (
    ".*does not have many workers.*",  # batches are prompts and seeds: workers have nothing to prefetch
    ".*infer the batch indices.*",  # only callbacks that use a sample's place in its data set need them
    ".*LeafSpec.*is deprecated.*",  # Lightning's own code, which users cannot change
    ".*Checkpoint directory .* exists and is not empty.*",  # a fit that continues; another one is refused
    ".*module\\(s\\) in eval mode.*",  # the frozen models are in eval mode on purpose
)
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.signal_connector",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "datasets.packaged_modules.parquet.parquet",
)
_LOG_MESSAGES = (
    "litlogger",  # an advertisement
    "[GTH]PU available: False",
    "`Trainer.fit` stopped: `max_(steps|epochs)=",  # the end that was asked for
    "`weights_only` was not set",  # of every checkpoint that is written
    "Received SIGTERM",  # the command line says what stopped the run
    "Failed to read (file|schema)",  # in several lines, what the error says
)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide messages of Lightning and datasets that do not apply here, and what :func:`quiet_models` hides.

    Warning filters, log levels and progress bars are as before after the block.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    applies = partial(_applies)  # an object of this call, so that blocks may be nested
    for logger in loggers:
        logger.addFilter(applies)
    try:
        with quiet_models(), warnings.catch_warnings():
            for message in _WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(applies)


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
    """False for log messages that say nothing."""
    return not re.search("|".join(_LOG_MESSAGES), str(record.msg))
