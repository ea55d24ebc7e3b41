"""Counts of the sweeps over malformed files and wrong settings, as a table at the end of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import pytest

KINDS = ("tracebacks", "hangs", "silently accepted", "poor lines")
_TRIED = pytest.StashKey[dict[str, tuple[int, Counter]]]()


def kind_of(found: object) -> str:
    """What a failure of a sweep is: it says ``loaded``, ``too slow``, what is wrong with its line, or an error."""
    if not isinstance(found, str) or found in ("loaded", "read for training"):
        return "silently accepted"
    if found == "too slow":
        return "hangs"
    return "poor lines" if found.startswith(("a line", "control", "an address", "refused")) else "tracebacks"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TRIED] = {}


@pytest.fixture
def count_sweep(request: pytest.FixtureRequest) -> Callable[[str, int, Mapping[str, object]], None]:
    """Add to the table how many cases of a name were tried, and what was found where it was not one line."""

    def count(name: str, tried: int, failures: Mapping[str, object]) -> None:
        sweeps = request.config.stash[_TRIED]
        before, kinds = sweeps.get(name, (0, Counter()))
        sweeps[name] = (before + tried, kinds + Counter(map(kind_of, failures.values())))

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tried = config.stash[_TRIED]
    if not tried:
        return
    width = max(map(len, tried)) + 2
    terminalreporter.section("hostile files and wrong settings")
    terminalreporter.line(f"{'':{width}}{'tried':>7}{''.join(f'{kind:>19}' for kind in KINDS)}")
    for name, (count, kinds) in tried.items():
        terminalreporter.line(f"{name:{width}}{count:7}{''.join(f'{kinds[kind]:19}' for kind in KINDS)}")
