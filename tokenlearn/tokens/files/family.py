"""What a family of programs is, which name the arrays of embedding files alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from tokenlearn.tokens.files.safetensors_files import Array
from tokenlearn.tokens.spaces import Space

FileSpace = Space | Literal["output_place"]
"""Where the vectors of a file live. OneTrainer puts those of ``output_place`` in place of the text encoder's output
at the token's position; no task here has such tokens."""


class Content(NamedTuple):
    """The content of a file before it is known whose it is.

    Attributes:
        arrays: by key; in files of unknown origin, possibly other objects than arrays.
        metadata: text entries.
    """

    arrays: Mapping[str, Any]
    metadata: dict[str, str] = {}  # noqa: RUF012 - read only


class Found(NamedTuple):
    """A token that a family has found in a file.

    Attributes:
        keys: key of the vectors of each text encoder.
        encoders: names of the text encoders in :data:`tokenlearn.tokens.files.encoders.ENCODERS`; None if the keys do
            not tell.
        token: the token, if the keys name it.
        space: where the vectors live.
        ignored: further keys of the token that no task here has a use for.
    """

    keys: tuple[str, ...]
    encoders: tuple[str, ...] | None = None
    token: str | None = None
    space: FileSpace = "input"
    ignored: tuple[str, ...] = ()


class Writer(Protocol):
    """How a family names the arrays of a token for one text encoder."""

    def __call__(self, token: str, vectors: Sequence[Array]) -> dict[str, Array]:
        """Arrays of a file by their keys.

        Args:
            token: the token as used in prompts.
            vectors: (n, width) per text encoder.
        """


class Reader(Protocol):
    """How a family recognises its files."""

    def __call__(self, keys: frozenset[str], source: Path) -> list[Found]:
        """Tokens among the keys of a file, none if the file is of another family.

        Args:
            keys: all keys of the file.
            source: the file, for messages.
        """


def wrapped(name: str) -> str:
    """A name as a token: in angle brackets, which keep it apart from the words of a prompt; white space as dashes."""
    bare = "-".join(name.split()).strip("<>")
    return f"<{bare}>"
