"""What the processes of a run tell each other."""

from __future__ import annotations

from typing import TypeVar

import torch

T = TypeVar("T")


def of_all_processes(value: T) -> list[T]:
    """The value of every process, in the order of their ranks; of a run of one process, its own alone.

    Args:
        value: anything that can be pickled.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [value]
    values = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
