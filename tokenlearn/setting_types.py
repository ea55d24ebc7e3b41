"""What constructors take: their settings, the types of these in plain words, and whether a value is of a type."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser

_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
_PLURALS = {bool: "values true or false", int: "whole numbers", float: "numbers", str: "texts"}
_VALUE_MODULES = ("builtins", "datetime", "os", "pathlib", "torch", "uuid")
"""Modules whose classes are given as values, not as a class with settings."""
_SHOWN = 60


def constructor_settings(target: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """Settings of a class or function by name, with the annotations evaluated; None where it takes any name.

    Arguments that a class hands on as ``**kwargs`` are those of its base classes.

    Args:
        target: class or function.
    """
    functions = [vars(base).get("__init__") for base in target.__mro__] if isinstance(target, type) else [target]
    settings: dict[str, inspect.Parameter] = {}
    open_names = False
    for function in filter(inspect.isfunction, functions):
        hints, open_names = _hints(function), False
        for index, parameter in enumerate(inspect.signature(function).parameters.values()):
            if parameter.kind == inspect.Parameter.VAR_KEYWORD:
                open_names = True
            elif parameter.kind != inspect.Parameter.VAR_POSITIONAL and not (index == 0 and isinstance(target, type)):
                hint = hints.get(parameter.name, parameter.annotation)
                settings.setdefault(parameter.name, parameter.replace(annotation=hint))
        if not open_names:
            return settings
    return None if open_names else settings


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Evaluated annotations; those that only type checkers can evaluate are left out."""
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        hints: dict[str, Any] = {}
        for name, annotation in getattr(function, "__annotations__", {}).items():
            lone = types.SimpleNamespace(__annotations__={name: annotation})
            try:
                hints |= typing.get_type_hints(lone, inspect.unwrap(function).__globals__)
            except (NameError, TypeError):
                hints[name] = Any
        return hints


def members(hint: Any) -> tuple[Any, ...]:  # noqa: ANN401 - annotations have no common type
    """Members of a union, else the annotation alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_open(hint: Any) -> bool:  # noqa: ANN401 - annotations have no common type
    """Whether an annotation says nothing."""
    return hint in (Any, inspect.Parameter.empty) or isinstance(hint, str | typing.TypeVar)


def is_settings(hint: Any) -> bool:  # noqa: ANN401 - annotations have no common type
    """Whether values are given as a mapping of settings."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def is_class(hint: Any) -> bool:  # noqa: ANN401 - annotations have no common type
    """Whether values are given by class and settings."""
    if not isinstance(hint, type) or get_origin(hint) is not None or dataclasses.is_dataclass(hint):
        return False
    return hint.__module__ not in _VALUE_MODULES and not issubclass(hint, int | float | str)


def made_classes(hint: Any) -> tuple[type, ...]:  # noqa: ANN401 - annotations have no common type
    """The classes that a value of an annotation may be of, or that a callable may make; none for other annotations."""
    if is_class(hint):
        return (hint,)
    return tuple(filter(is_class, members(get_args(hint)[1]))) if _callable(hint) else ()


def returned_classes(function: Callable[..., Any]) -> tuple[type, ...]:
    """The classes of what a function returns by its annotation; none without one."""
    returned = _hints(function).get("return") if callable(function) else None
    return tuple(member for member in members(returned) if isinstance(member, type))


def called_with(hint: Any) -> int:  # noqa: ANN401 - annotations have no common type
    """Number of arguments that a callable is called with; 0 for other annotations."""
    return len(get_args(hint)[0]) if _callable(hint) and isinstance(get_args(hint)[0], list) else 0


def _callable(hint: Any) -> bool:  # noqa: ANN401 - annotations have no common type
    return get_origin(hint) is not None and get_origin(hint) is get_origin(Callable[..., Any]) and bool(get_args(hint))


def elements(hint: Any) -> Any:  # noqa: ANN401 - annotations have no common type
    """Annotation of the elements of a list; None for other annotations."""
    origin = get_origin(hint)
    if not isinstance(origin, type) or issubclass(origin, Mapping) or _callable(hint) or not get_args(hint):
        return None
    is_list = issubclass(origin, list | set) or origin.__name__ in ("Sequence", "Iterable", "Collection")
    return get_args(hint)[0] if is_list else None


def entries(hint: Any) -> tuple[Any, Any] | None:  # noqa: ANN401 - annotations have no common type
    """Annotations of the keys and the values of a mapping; None for other annotations."""
    origin = get_origin(hint)
    found = isinstance(origin, type) and issubclass(origin, Mapping) and len(get_args(hint)) == 2
    return typing.cast("tuple[Any, Any]", get_args(hint)) if found else None


def is_nested(hint: Any) -> bool:  # noqa: ANN401 - annotations have no common type
    """Whether values have parts that are checked one by one."""
    return any(
        is_settings(member) or made_classes(member) or elements(member) is not None or entries(member)
        for member in members(hint)
    )


def accepts(hint: Any, value: object) -> bool:  # noqa: ANN401 - annotations have no common type
    """Whether the parser takes a value for an annotation.

    Args:
        hint: annotation.
        value: value of a config file; or text, as on the command line.
    """
    if is_open(hint):
        return True
    try:
        parser = _parser(hint)
    except (TypeError, ValueError):  # an annotation that the parser does not know
        return True
    try:
        if isinstance(value, str) and str not in members(hint):
            parser.parse_args([f"--value={value}"])
        else:
            parser.parse_object({"value": value})
    except (ArgumentError, TypeError, ValueError):
        return False
    return value is not None or types.NoneType in members(hint)


@lru_cache(maxsize=512)
def _parser(hint: Any) -> ArgumentParser:  # noqa: ANN401 - annotations have no common type
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--value", type=hint)
    return parser


def subclasses(base: type) -> Iterator[type]:
    """The public classes that can stand for a base class and are imported, the base first."""
    seen: set[type] = set()
    pending = [base]
    while pending:
        cls = pending.pop(0)
        if cls not in seen:
            seen.add(cls)
            pending += cls.__subclasses__()
            if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
                yield cls


def describe(hint: Any) -> str:  # noqa: ANN401 - annotations have no common type
    """A type in words: ``int | None`` is "a whole number or null"."""
    parts = [_describe_one(member) for member in members(hint) if member is not types.NoneType]
    parts += ["null"] if types.NoneType in members(hint) else []
    return " or ".join(dict.fromkeys(parts))


def _describe_one(hint: Any) -> str:  # noqa: ANN401 - annotations have no common type
    if hint in _PLAIN:
        return _PLAIN[hint]
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(show, get_args(hint)))}"
    if is_settings(hint):
        return f"settings of {hint.__name__} ({', '.join(constructor_settings(hint) or ())})"
    if made := made_classes(hint):
        return f"a class of {made[0].__name__}{_choices(made[0])}"
    if (kinds := entries(hint)) is not None:
        return f"a mapping of {_plural(kinds[0])} to {_plural(kinds[1])}"
    if (element := elements(hint)) is not None:
        return f"a list of {_plural(element)}"
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))} values ({', '.join(map(describe, get_args(hint)))})"
    return getattr(hint, "__name__", None) or str(hint).replace("typing.", "")


def _plural(hint: Any) -> str:  # noqa: ANN401 - annotations have no common type
    return _PLURALS.get(hint) or describe(hint)


def _choices(base: type) -> str:
    names = sorted({cls.__name__ for cls in subclasses(base) if cls is not base})
    return f" ({', '.join(names)})" if 0 < len(names) <= 12 else ""


def show(value: object) -> str:
    """A value as YAML writes it, in one short line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."
