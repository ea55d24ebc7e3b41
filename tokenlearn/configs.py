"""Several ``--config`` files as one configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from tokenlearn.errors import UserError, reason_of
from tokenlearn.paths import resolve_config


def combine_configs(options: Sequence[str]) -> tuple[list[str], str]:
    """Command-line options with the config files first and in a form that merges in any order.

    The parser merges files key by key and later ones override, but it knows the settings of a section only once the
    section's class is named. So a first config names the classes: then a file with ``model.init_args.backbone`` alone
    may come before the file with ``model.class_path``. Options override files wherever they stand.

    Args:
        options: command line after the command.

    Returns:
        Options for the parser, and the name of the run: that of the last file, or ``run`` without a file.

    Raises:
        UserError: if a file does not exist or is not YAML.
    """
    names, rest = _split(options)
    files = [resolve_config(name) for name in names]
    first = [json.dumps(_classes(files))] if len(files) > 1 else []
    configs = [argument for config in (*first, *map(str, files)) for argument in ("--config", config)]
    return [*configs, *rest], files[-1].stem if files else "run"


def _split(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Values of ``--config`` or ``-c``, and the other options."""
    names, rest = [], []
    remaining = iter(options)
    for option in remaining:
        flag, equals, value = option.partition("=")
        if flag not in ("--config", "-c"):
            rest.append(option)
        elif equals:
            names.append(value)
        else:
            names.append(next(remaining, ""))
    return names, rest


def _classes(files: Sequence[Path]) -> dict[str, dict[str, str]]:
    """Section to its class, from the last file that names one."""
    classes = {}
    for file in files:
        try:
            content = yaml.safe_load(file.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"config file '{file}' is not valid YAML ({reason_of(error)}); correct it") from error
        for section, settings in content.items() if isinstance(content, dict) else ():
            if isinstance(settings, dict) and "class_path" in settings:
                classes[section] = {"class_path": settings["class_path"]}
    return classes
