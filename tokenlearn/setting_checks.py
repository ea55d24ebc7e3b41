"""One line for the first setting of a run that is misspelt, misplaced, missing or of a wrong type.

The parser checks the same, but reports it with every type that each section above the setting could have had.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tokenlearn.configs import Typed
from tokenlearn.errors import UserError, reason_of
from tokenlearn.setting_types import (
    accepts,
    called_with,
    constructor_settings,
    describe,
    elements,
    entries,
    is_nested,
    is_open,
    is_settings,
    made_classes,
    members,
    returned_classes,
    show,
    subclasses,
)

_CLASS_KEYS = frozenset({"class_path", "init_args", "dict_kwargs"})
_SHORT = 200
_SECTION_KEYS = _CLASS_KEYS | {"__path__"}


@dataclass(frozen=True)
class Section:
    """A section of the configuration.

    Attributes:
        base: class whose subclasses the section names; or whose settings the section is.
        named: whether the section names its class.
    """

    base: type
    named: bool


def check_settings(
    given: Mapping[str, Any], sections: Mapping[str, Section], others: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Refuse the first wrong setting.

    Args:
        given: settings by section, files and options merged; values of options are :class:`Typed`.
        sections: known sections.
        others: settings outside of sections, each with its type.

    Raises:
        UserError: naming the setting with its section, the value, what was expected, and the nearest right name.
    """
    _Checks(given, sections, others).run()


def parser_line(message: str) -> str:
    """The parser's message about a setting in one short line, where it lists all types of all sections above it.

    Args:
        message: what the parser says.
    """
    message = " ".join(message.split())
    keys = list(re.finditer(r'Parser key "([^"]+)": ', message))
    if len(message) <= _SHORT or not keys:
        return message
    names = [key[1] for key in keys]
    count = next((number for number in range(1, len(names)) if names[number] in names[:number]), len(names))
    reason = message[keys[count - 1].end() :].rpartition("Errors: - ")[2].partition(" - ")[0]
    shortened = reason if len(reason) <= _SHORT else f"{reason[:_SHORT]} ..."
    return f"{'.'.join(names[:count])} has a value of another kind than expected ({shortened}); correct it"


class _Checks:
    """The checks of one configuration."""

    def __init__(self, given: Mapping[str, Any], sections: Mapping[str, Section], others: Mapping[str, Any]) -> None:
        self.given, self.sections, self.others = given, sections, others

    def run(self) -> None:
        for name, value in self.given.items():
            if name in self.sections:
                self._check_section(name, value)
            elif name in self.others:
                self._check(name, self.others[name], value, inspect.Parameter.empty)
            else:
                known = [*self.sections, *self.others]
                raise UserError(f"there is no section or setting '{name}'; {self._way_out(name, '', known)}")

    def _check_section(self, name: str, value: Any) -> None:  # noqa: ANN401 - a user's value
        section = self.sections[name]
        value = _loaded(value)
        if section.named:
            if value is not None:
                self._check_class(name, section.base, value, inspect.Parameter.empty)
        elif not isinstance(value, Mapping):
            raise UserError(f"{name} must be settings of {section.base.__name__}, got {show(value)}")
        else:
            self._check_names(name, section.base, value, required=False)

    def _check(self, path: str, hint: Any, value: Any, default: Any) -> None:  # noqa: ANN401 - a user's value
        """Check a value of any type."""
        if is_open(hint) or (value is None and default is None):
            return
        if not is_nested(hint):
            self._check_plain(path, hint, value)
            return
        if isinstance(value, Typed):
            plain = [member for member in members(hint) if not is_nested(member)]
            loaded = value.load()
            shaped = isinstance(loaded, Mapping | list) and self._member_for(hint, loaded) is not None
            if not shaped and any(accepts(member, value.text) for member in plain):
                return
            value = loaded
        self._check_nested(path, hint, value, default)

    def _check_added(self, path: str, hint: Any, value: Any) -> None:  # noqa: ANN401 - a user's value
        """Check what is added to a list: elements of it, or lists of them."""
        element = next((found for member in members(hint) if (found := elements(member)) is not None), None)
        if element is None:
            raise UserError(f"{path} adds to a list, and this setting is {describe(hint)}; leave out the '+'")
        for entry in value if isinstance(value, list) else [value]:
            loaded = _loaded(entry)
            if isinstance(loaded, Mapping) and not is_nested(element) and not is_open(element):
                # The parser would make settings of it, even where text is expected.
                quotes = f"; put it in quotes, as in --{path}='\"{entry.text}\"'" if isinstance(entry, Typed) else ""
                raise UserError(f"{path} must be {describe(element)}, got {show(loaded)}{quotes}")
            self._check(path, hint if isinstance(loaded, list) else element, entry, inspect.Parameter.empty)

    def _check_plain(self, path: str, hint: Any, value: Any) -> None:  # noqa: ANN401 - a user's value
        if isinstance(value, Typed):
            value = None if value.text == "null" else value.text
            if value is not None and str in members(hint):
                return
        if not accepts(hint, value):
            raise UserError(f"{path} must be {describe(hint)}, got {show(value)}{_advice(hint, value)}")

    def _check_nested(self, path: str, hint: Any, value: Any, default: Any) -> None:  # noqa: ANN401 - a user's value
        refusal = UserError(f"{path} must be {describe(hint)}, got {show(value)}{_advice(hint, value)}")
        for member in members(hint):
            if not is_nested(member) and accepts(member, value):
                return
        chosen = self._member_for(hint, value)
        if chosen is None:
            raise refusal
        if is_settings(chosen):
            self._check_names(path, chosen, value, required=True)
        elif made_classes(chosen):
            self._check_class(path, hint, value, default)
        elif (kinds := entries(chosen)) is not None:
            for key, entry in value.items():
                if not accepts(kinds[0], key):
                    expected = describe(kinds[0])
                    raise UserError(f"{path} has the name {show(key)}; expected {expected}{_quotes(key)}")
                self._check(f"{path}.{key}", kinds[1], entry, inspect.Parameter.empty)
        else:
            element = elements(chosen)
            for index, entry in enumerate(value):
                self._check(f"{path}[{index}]", element, entry, inspect.Parameter.empty)

    def _member_for(self, hint: Any, value: Any) -> Any:  # noqa: ANN401 - a user's value
        """The member of a union that a value of this shape is meant for, None for a value of another shape."""
        nested = [member for member in members(hint) if is_nested(member)]
        if isinstance(value, Mapping):
            classes = [member for member in nested if made_classes(member)]
            if classes and (_CLASS_KEYS & value.keys() or not any(map(is_settings, nested))):
                mappings = [member for member in nested if entries(member)]
                return classes[0] if _CLASS_KEYS & value.keys() or not mappings else mappings[0]
            return next((member for member in nested if is_settings(member) or entries(member)), None)
        if isinstance(value, list | tuple):
            return next((member for member in nested if elements(member) is not None), None)
        if isinstance(value, str):
            return next((member for member in nested if made_classes(member)), None)
        return None

    def _check_class(self, path: str, hint: Any, value: Any, default: Any) -> None:  # noqa: ANN401 - a user's value
        """Check a class and its settings."""
        expected = f"{path} must be {describe(hint)}"
        if isinstance(value, str):
            value = {"class_path": value}
        if not isinstance(value, Mapping):
            raise UserError(f"{expected}, got {show(value)}")
        settings: Any = value
        if _CLASS_KEYS & value.keys():
            settings = _loaded(value.get("init_args"))
            settings = {} if settings is None else settings
            foreign = [key for key in value if key not in _SECTION_KEYS]
            if foreign:
                raise UserError(
                    f"{path} has '{foreign[0]}' beside class_path; the settings of a class go below init_args: "
                    f"{path}.init_args.{foreign[0]}"
                )
        if not isinstance(settings, Mapping):
            raise UserError(f"{path}.init_args must be a mapping of settings, got {show(settings)}")
        bases = tuple(cls for member in members(hint) for cls in made_classes(member))
        name = _loaded(value.get("class_path"))
        if "class_path" not in value:
            cls = _class_of_default(bases, default)
            if cls is None:
                raise UserError(f"{path} has settings but no class; name it too, as in --{path} CLASS; {expected}")
        elif isinstance(name, str) and name:
            if "." not in name and (advice := _advice(hint, name)):  # the nearest word beside the classes
                raise UserError(f"{expected}, got {show(name)}{advice}")
            cls = self._resolve(path, bases, name, expected)
        else:
            raise UserError(f"{expected}, got the class_path {show(name)}{_quotes(name)}")
        if cls is not None:
            skipped = max(map(called_with, members(hint)))
            self._check_names(path, cls, settings, required="class_path" in value, skipped=skipped)

    def _resolve(self, path: str, bases: Sequence[type], name: str, expected: str) -> type | None:
        """The class of a name; None for a function, whose class is known only once it is called."""
        if "." not in name:
            classes = {cls.__name__: cls for base in bases for cls in subclasses(base)}
            named = {cls for base in bases for cls in subclasses(base) if cls.__name__ == name}
            if len(named) > 1:
                paths = sorted(f"{cls.__module__}.{name}" for cls in named)
                raise UserError(f"{path} '{name}' is the name of several classes; write {' or '.join(paths)}")
            if named:
                return named.pop()
            near = difflib.get_close_matches(name, classes, n=1, cutoff=0.5)
            way_out = f"did you mean {near[0]}?" if near else "name a class of your own with its module"
            raise UserError(f"{expected}, got {show(name)}; {way_out}")
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"{path} names the class '{name}', which cannot be imported ({reason_of(error)}); check the name, and "
                "that its module is on PYTHONPATH"
            ) from error
        made = (found,) if isinstance(found, type) else returned_classes(found)
        if not any(issubclass(cls, tuple(bases)) for cls in made):
            raise UserError(f"{expected}, got '{name}', which is none")
        return found if isinstance(found, type) else None

    def _check_names(
        self,
        path: str,
        target: Callable[..., Any],
        values: Mapping[str, Any],
        *,
        required: bool,
        skipped: int = 0,
    ) -> None:
        """Check names and values of the settings of a class."""
        settings = constructor_settings(target)
        if settings is None:
            return
        known = dict(list(settings.items())[skipped:])
        title = getattr(target, "__name__", "")
        for name, value in values.items():
            if name == "dict_kwargs":
                continue
            key = name.removesuffix("+") if isinstance(name, str) else name
            if key not in known:
                found = show(value.text if isinstance(value, Typed) else value)
                way_out = self._way_out(str(key), path, known)
                raise UserError(f"{path} ({title}) has no setting '{key}', got {found}; {way_out}")
            if key == name:
                self._check(f"{path}.{key}", known[key].annotation, value, known[key].default)
            else:
                self._check_added(f"{path}.{name}", known[key].annotation, value)
        missing = [
            name
            for name, parameter in known.items()
            if parameter.default is inspect.Parameter.empty and name not in values and f"{name}+" not in values
        ]
        if required and missing:
            expected = describe(known[missing[0]].annotation)
            raise UserError(f"{path}.{missing[0]} is missing, which {title} needs; it must be {expected}")

    def _way_out(self, name: str, path: str, known: Sequence[str] | Mapping[str, Any]) -> str:
        """Where a setting of this name, or of the nearest name, is."""
        everywhere = [place for section in self.sections for place in self._places(section)]
        exact = [place for place in everywhere if place.rpartition(".")[2] == name]
        section = path.partition(".")[0]
        exact.sort(key=lambda place: (place.partition(".")[0] != section, place.count(".")))
        if exact:
            other = exact[0].partition(".")[0]
            return f"it is {exact[0]}" if other == section else f"it is in {other}: {exact[0]}"
        near = difflib.get_close_matches(name, list(known), n=1)
        if near:
            return f"did you mean '{near[0]}'?"
        names = {place.rpartition(".")[2]: place for place in reversed(everywhere)}
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
        if near:
            return f"did you mean {names[near[0]]}?"
        return (
            f"it has {', '.join(known)}" if known else "it has no settings; remove it, or name a class_path beside it"
        )

    def _places(self, section: str) -> Iterator[str]:
        """Paths of all settings of a section's class."""
        about, value = self.sections[section], _loaded(self.given.get(section))
        if not about.named:
            yield from _paths(section, about.base)
            return
        name = _loaded(value.get("class_path")) if isinstance(value, Mapping) else value
        if isinstance(name, str):
            try:
                cls = self._resolve(section, [about.base], name, "")
            except UserError:
                return
            if cls is not None:
                yield from _paths(section, cls)


def _paths(prefix: str, target: Callable[..., Any]) -> Iterator[str]:
    """Paths of the settings of a class, and of the groups of settings among them."""
    for name, parameter in (constructor_settings(target) or {}).items():
        yield f"{prefix}.{name}"
        for member in members(parameter.annotation):
            if is_settings(member):
                yield from _paths(f"{prefix}.{name}", member)


def _loaded(value: Any) -> Any:  # noqa: ANN401 - a user's value
    return value.load() if isinstance(value, Typed) else value


def _class_of_default(bases: Sequence[type], default: Any) -> type | None:  # noqa: ANN401 - a setting's value
    """The class that settings without a class are of; None where there is none."""
    if isinstance(default, tuple(bases)):
        return type(default)
    return None if inspect.isabstract(bases[0]) or inspect.isfunction(default) else bases[0]


def _advice(hint: Any, value: object) -> str:  # noqa: ANN401 - an annotation
    """The way out for values whose mistake is a common one."""
    kinds = members(hint)
    if str in kinds and value is not None and not isinstance(value, str | Mapping | list):
        return _quotes(value)
    if isinstance(value, str):
        literals = [choice for kind in kinds for choice in getattr(kind, "__args__", ()) if isinstance(choice, str)]
        near = difflib.get_close_matches(value, literals, n=1)
        if near:
            return f"; did you mean '{near[0]}'?"
    return ""


def _quotes(value: object) -> str:
    if isinstance(value, bool):
        return "; YAML reads yes, no, on and off as true and false: put the word in quotes"
    return "; put it in quotes" if isinstance(value, int | float) else ""
