"""UserError, the one exception that the command line reports without a traceback, and helpers around it."""

from __future__ import annotations

from collections.abc import Iterable

_REASON = 200
_LONGEST_NAME = 200  # bytes; most file systems take 255, and suffixes and temporary names are longer
MOST_RATIO = 8
"""How many times as long as the other one side of an image may be."""


class UserError(ValueError):
    """Input that the user can correct.

    The message is one line: what was found, what was expected, and the way out.
    """


def check_at_least(section: str, least: int, **numbers: float | None) -> None:
    """Refuse settings below a bound and settings that are NaN; None means that a setting is not given.

    Args:
        section: section of the config that the settings are in, such as ``data``.
        least: the bound.
        numbers: settings by name.

    Raises:
        UserError: naming the first setting that is out of range.
    """
    for name, number in numbers.items():
        if number is not None and not number >= least:
            raise UserError(f"{section}.{name} must be at least {least}, got {number}")


def check_file_name(name: str, what: str) -> None:
    """Refuse the name of a file or folder that is longer than file systems take, before anything is computed for it.

    Args:
        name: the name.
        what: what it is the name of, in a message.

    Raises:
        UserError: naming what it is of.
    """
    length = len(name.encode())
    if length > _LONGEST_NAME:
        raise UserError(
            f"{what} {shown(name)} gives a file name of {length} bytes, more than {_LONGEST_NAME}; give a shorter name"
        )


def check_seeds(setting: str, seeds: Iterable[int]) -> None:
    """Refuse seeds that torch's generators do not take.

    Args:
        setting: name of the setting.
        seeds: its seeds.

    Raises:
        UserError: naming the first seed that is out of range.
    """
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise UserError(f"{setting} must be whole numbers from 0 to 2^63 - 1, got {seed}")


def check_unicode(text: str, what: str) -> None:
    """Refuse text with a lone surrogate, half of a character, which neither tokenizers nor files take.

    Escapes of one half without the other give it, and bytes of another encoding on the command line.

    Args:
        text: the text.
        what: what it is in a message, such as ``prompt``.

    Raises:
        UserError: naming the text, with the surrogate written as an escape.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} {shown(text)} has {shown(text[error.start])}, which is half of a character or not UTF-8; type "
            "this character again"
        ) from None


def check_template(template: str, setting: str, content: str = "token") -> None:
    """Refuse a prompt template without exactly one ``{}``, or with other braces.

    Args:
        template: the template.
        setting: name of its setting, such as ``model.template``.
        content: what takes the place of ``{}``.

    Raises:
        UserError: naming setting and template.
    """
    if template.count("{}") != 1:
        raise UserError(f"{setting} '{template}' must have exactly one '{{}}', where the {content} goes")
    check_braces(template, setting, content)


def check_braces(text: str, setting: str, content: str) -> None:
    """Refuse braces other than ``{}``.

    Args:
        text: text with any number of ``{}``.
        setting: name of its setting.
        content: what takes the place of ``{}``.

    Raises:
        UserError: naming setting and text.
    """
    if set("{}") & set(text.replace("{}", "")):
        raise UserError(
            f"{setting} '{text}' has a brace that is not part of '{{}}', where the {content} goes; remove it"
        )


def reason_of(error: Exception) -> str:
    """A library's error message in one line of about 200 characters, or the name of its class if it is empty.

    A longer message is cut after a sentence, or else between words.
    """
    whole = " ".join(str(error).split())
    if len(whole) <= _REASON:
        return whole or type(error).__name__
    sentence = whole.rfind(". ", _REASON // 4, _REASON)
    if sentence > 0:
        return whole[:sentence]
    return f"{whole[:_REASON].rpartition(' ')[0] or whole[:_REASON]} ..."


def shown(text: object, length: int = 60) -> str:
    """Text of a foreign file in quotes for a message: at most ``length`` characters, control characters escaped."""
    whole = str(text)
    cut = whole if len(whole) <= length else f"{whole[:length]}..."
    return f"'{''.join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in cut)}'"
