"""Several ``--config`` files as one configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from tokenlearn.errors import UserError, check_unicode, reason_of
from tokenlearn.paths import resolve_config

_MOST_VALUES = 100_000
_LEVELS_OF_NAMES = 2  # sections and their settings; deeper names may be those of classes, which the settings check
_NULL = re.compile(r"--(?P<path>(model|data|evaluation)\.\w+(\.\w+)+)=null")


@dataclass(frozen=True)
class Typed:
    """A value as it was typed on the command line, of which the setting's type decides what it means."""

    text: str

    def load(self) -> Any:  # noqa: ANN401 - whatever YAML has
        """The value that YAML makes of it; the text itself where it is not YAML.

        Raises:
            UserError: if it has an escape of half of a character.
        """
        try:
            value = yaml.safe_load(self.text)
        except yaml.YAMLError:
            return self.text
        _check_texts(value, "option")
        return value


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
    """Sections of a config file.

    Raises:
        UserError: if the file is not YAML, or has no sections.
    """
    try:
        content = yaml.safe_load(file.read_text())
    except RecursionError:
        raise UserError(f"config file '{file}' is nested too deeply; correct it") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file '{file}' is not valid YAML ({reason_of(error)}); correct it") from error
    if not isinstance(content, dict) or not content:
        found = (
            "is empty" if content in (None, {}) else f"has no sections, but '{' '.join(str(content).split())[:40]}'"
        )
        raise UserError(f"config file '{file}' {found}; it must have sections such as model, data and trainer")
    _check_tree(content, file)
    _check_texts(content, f"config file '{file}': the text")
    return content


def _check_texts(value: Any, what: str) -> None:  # noqa: ANN401 - whatever YAML has
    """Refuse halves of characters, which escapes can make, in names and values."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        found = pending.pop()
        if isinstance(found, str):
            check_unicode(found, what)
        elif isinstance(found, dict | list) and id(found) not in seen:
            seen.add(id(found))
            pending += [*found, *found.values()] if isinstance(found, dict) else found


def _check_tree(content: dict[Any, Any], file: Path) -> None:
    """Refuse names of sections and settings that are not text, and aliases that make a file endless or very large."""
    pending: list[tuple[tuple[int, ...], Any]] = [((), content)]
    count = 0
    while pending:
        above, value = pending.pop()
        count += 1
        if id(value) in above:
            raise UserError(f"config file '{file}' has an alias (*) of something that it is within; write it out")
        if count > _MOST_VALUES:
            raise UserError(
                f"config file '{file}' has more than {_MOST_VALUES} values once its aliases (*) are written out; "
                "write fewer"
            )
        if isinstance(value, dict):
            names = value if len(above) < _LEVELS_OF_NAMES else {}
            if (name := next((name for name in names if not isinstance(name, str)), "")) != "":
                raise UserError(
                    f"config file '{file}' has the name {json.dumps(name, default=str)} where the name of a section "
                    "or setting is expected; correct it, or put it in quotes"
                )
            pending += [((*above, id(value)), item) for item in value.values()]
        elif isinstance(value, list):
            pending += [((*above, id(value)), item) for item in value]


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


def given_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """All settings of a command line as one tree, before the parser fills in defaults.

    Args:
        arguments: what :func:`combine_configs` returns.

    Returns:
        Settings of files with those of later files and options in place of earlier ones; of options :class:`Typed`.
    """
    settings: dict[str, Any] = {}
    for name, text in _pairs(arguments):
        if name == "config":
            content = json.loads(text) if text.startswith("{") else _content(Path(text))
            settings = _merged(settings, content)
        else:
            _insert(settings, [part for part in name.split(".") if part != "init_args"], text)
    return settings


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether the parser prints something and stops, so that settings may be missing."""
    return any(
        re.fullmatch(r"-h|--help|--print_config(=.*)?|--[\w.]+\.help(=.*)?", argument) for argument in arguments
    )


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and value of each option."""
    remaining = list(arguments)
    while remaining:
        option = remaining.pop(0)
        if not option.startswith("--"):
            continue  # the parser refuses it
        name, equals, value = option[2:].partition("=")
        if equals or (remaining and not remaining[0].startswith("--")):
            yield name, value if equals else remaining.pop(0)


def _merged(settings: Any, changes: Any) -> Any:  # noqa: ANN401 - whatever YAML has
    """Settings with changes; another class starts afresh."""
    if not isinstance(settings, Mapping) or not isinstance(changes, Mapping):
        return changes
    classes = [str(item.get("class_path", "")).rpartition(".")[2] for item in (settings, changes)]
    if all(classes) and classes[0] != classes[1]:
        return changes
    return {**settings, **{name: _merged(settings.get(name), change) for name, change in changes.items()}}


def _insert(settings: dict[str, Any], path: Sequence[str], text: str) -> None:
    """Set an option, below ``init_args`` of every class on its way; after ``name+``, of the last one added."""
    name, *rest = path
    if name not in ("class_path", "dict_kwargs") and ("class_path" in settings or "init_args" in settings):
        settings = settings.setdefault("init_args", {})
    if not rest and name.endswith("+"):
        settings[name] = [*settings.get(name, []), Typed(text)]
    elif not rest:
        settings[name] = Typed(text)
    elif added := settings.get(f"{name}+"):
        added[-1] = _named(added[-1])
        _insert(added[-1], rest, text)
    else:
        settings[name] = _named(settings.get(name))
        _insert(settings[name], rest, text)


def _named(value: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever YAML has
    """Settings that options are inserted into: a copy, or those of the class that a value names."""
    value = value.load() if isinstance(value, Typed) else value
    value = {"class_path": value} if isinstance(value, str) else value
    return dict(value) if isinstance(value, Mapping) else {}
