"""The settings of a run, in its folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import yaml  # type: ignore[import-untyped]
from lightning.pytorch.cli import SaveConfigCallback

from tokenlearn.data.latent_cache import json_hash
from tokenlearn.files import atomic_write

_NAME = "config.yaml"
_SECTIONS = ("model", "data", "evaluation", "seed_everything")
_FIRST_LINE = re.compile(r"# tokenlearn (?P<command>\w+), settings (?P<settings>[0-9a-f]+)")


class RunConfig(SaveConfigCallback):
    """Write the resolved settings to ``config.yaml`` of the run folder, whole or not at all.

    They run again anywhere: the run folder and, of a fit, the checkpoint that it continued from are left out. The
    first line names the command and the hash of the settings. Where the folder has the settings of another command,
    they stay, and the file is ``config_<command>.yaml``.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the file; Lightning would write it to the folder of its log, and in parts."""
        if self.already_saved or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        self.already_saved = True
        assert trainer.state.fn is not None
        command = trainer.state.fn.value
        config = self.config.clone()
        config.output_dir = None
        if command == "fit":
            config.ckpt_path = None
        text = self.parser.dump(config, skip_none=False)
        folder = Path(trainer.default_root_dir)
        of_another = recorded(folder)[0] not in (None, command)
        with atomic_write(folder / (f"config_{command}.yaml" if of_another else _NAME)) as temporary:
            temporary.write_text(f"# tokenlearn {command}, settings {settings_hash(yaml.safe_load(text))}\n{text}")


def settings_hash(config: Mapping[str, Any]) -> str:
    """Hash of the sections of a config that results depend on."""
    return json_hash({name: config.get(name) for name in _SECTIONS})


def recorded(folder: Path) -> tuple[str | None, str | None]:
    """Command and hash of the settings whose ``config.yaml`` a folder has; None where it says neither."""
    try:
        with (folder / _NAME).open() as file:
            found = _FIRST_LINE.match(file.readline())
    except (OSError, UnicodeDecodeError):
        found = None
    return (None, None) if found is None else (found["command"], found["settings"])
