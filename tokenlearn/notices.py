"""One-line notices and warnings to the user that end nothing."""

from __future__ import annotations

import sys
import warnings


def notice(text: str) -> None:
    """Print a line on the error stream, where it stays out of what a program reads."""
    print(f"tokenlearn: {' '.join(text.split())}", file=sys.stderr, flush=True)


def warn_once(text: str, stacklevel: int = 2) -> None:
    """Warn in the first process alone, of something that all processes of a run see.

    Args:
        text: the warning.
        stacklevel: as of ``warnings.warn``.
    """
    if is_first_process():
        warnings.warn(text, stacklevel=stacklevel + 1)


def is_first_process() -> bool:
    """Whether this is the first process of a run; without Lightning there is no other."""
    utilities = sys.modules.get("lightning_utilities.core.rank_zero")  # which Lightning tells the rank
    return getattr(getattr(utilities, "rank_zero_only", None), "rank", None) in (None, 0)
