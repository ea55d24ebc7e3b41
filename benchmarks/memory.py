"""Memory that a step allocates, counted exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Most bytes that a step has allocated at once, beyond the bytes before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results: Any = cast(Any, profile).profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    peak = now = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        now += change
        peak = max(peak, now)
    return peak
