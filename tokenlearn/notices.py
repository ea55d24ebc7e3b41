"""One-line notices to the user that end nothing."""

from __future__ import annotations

import sys


def notice(text: str) -> None:
    """Print a line on the error stream, where it stays out of what a program reads."""
    print(f"tokenlearn: {' '.join(text.split())}", file=sys.stderr, flush=True)
