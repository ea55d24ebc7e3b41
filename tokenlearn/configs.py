"""Several ``--config`` files as one configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from tokenlearn.errors import UserError, reason_of
from tokenlearn.paths import resolve_config

_NULL = re.compile(r"--(?P<path>(model|data|evaluation)\.\w+(\.\w+)+)=null")


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
    contents = [_content(file) for file in files]
    nulls, rest = _null_settings(rest, contents)
    classes = [json.dumps(_classes(contents))] if len(files) > 1 or nulls else []
    configs = [argument for config in (*classes, *map(str, files), *nulls) for argument in ("--config", config)]
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


def _content(file: Path) -> dict[str, Any]:
    """Sections of a config file; empty for a file without any.

    Raises:
        UserError: if the file is not YAML.
    """
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file '{file}' is not valid YAML ({reason_of(error)}); correct it") from error
    return content if isinstance(content, dict) else {}


def _classes(contents: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Section to its class, from the last file that names one."""
    return {
        section: {"class_path": settings["class_path"]}
        for content in contents
        for section, settings in content.items()
        if isinstance(settings, dict) and "class_path" in settings
    }


def _null_settings(options: Sequence[str], contents: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Settings within settings that options set to null, as configs, and the other options.

    The parser hands a null of such an option on as the word "None": ``--model.tokens.initial_words=null`` would start
    tokens from a word of this name.
    """
    configs, rest = [], []
    remaining = list(options)
    while remaining:
        option = remaining.pop(0)
        apart = option.startswith("--") and remaining[:1] == ["null"]
        found = _NULL.fullmatch(f"{option}=null" if apart else option)
        if found is None:
            rest.append(option)
            continue
        del remaining[:apart]
        path = [part for part in found["path"].split(".") if part != "init_args"]
        configs.append(json.dumps(_nested(path, [content.get(path[0]) for content in contents])))
    return configs, rest


def _nested(path: Sequence[str], settings: Sequence[Any]) -> dict[str, Any]:
    """Null at a path, within ``init_args`` wherever the files name a class."""
    name, *rest = path
    if not rest:
        return {name: None}
    known = [item for item in settings if isinstance(item, dict)]
    if any("class_path" in item or "init_args" in item for item in known):
        known = [item.get("init_args") or {} for item in known]
        return {name: {"init_args": _nested(rest, [item.get(rest[0]) for item in known])}}
    return {name: _nested(rest, [item.get(rest[0]) for item in known])}
