"""Lightning's files of a run, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from tokenlearn.files import atomic_write


class WholeCheckpoints(TorchCheckpointIO):
    """Write checkpoints beside their place and rename them.

    Lightning writes them to the system's folder of temporary files. From another disk they are copied, so a killed run
    would leave half a checkpoint; and nobody would remove what it leaves there.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any | None = None,  # noqa: ANN401 - Lightning's signature
    ) -> None:
        """Write a checkpoint; to an address, as Lightning does."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # To an open file: a path's name, here a random one, would be part of the content.
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)


class RunLogger(TensorBoardLogger):
    """TensorBoard's log, beside a ``hparams.yaml`` that is never cut: Lightning would leave a cut one for good."""

    @rank_zero_only
    def save(self) -> None:
        """Write the settings if they are not there."""
        path = Path(self.log_dir, self.NAME_HPARAMS_FILE)
        if path.parent.is_dir() and not path.is_file():
            with atomic_write(path) as temporary:
                save_hparams_to_yaml(temporary, self.hparams)
        super().save()
