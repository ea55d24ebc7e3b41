"""The run folder, when several processes write to it."""

from __future__ import annotations

from pathlib import Path

import lightning as L


def common_run_folder(trainer: L.Trainer) -> Path:
    """The run folder of the first process: each process names its folder by its start time.

    Call it in all processes at once, and before any batch, because their numbers of batches may differ.
    """
    return Path(trainer.strategy.broadcast(trainer.default_root_dir))
