"""Wall-clock time of a function."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

R = TypeVar("R")


def timed(function: Callable[[], R], device: torch.device) -> tuple[R, float]:
    """Result of a function, and the seconds until ``device`` has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start
