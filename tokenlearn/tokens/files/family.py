"""What a family of programs is, which name the tensors of embedding files alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Content(NamedTuple):
    """The content of a file before it is known whose it is.

    Attributes:
        tensors: by key; in files of unknown origin, possibly other objects than tensors.
        metadata: text entries.
        token: the token, if an entry of the file names it.
    """

    tensors: Mapping[str, Any]
    metadata: dict[str, str] = {}  # noqa: RUF012 - read only
    token: str | None = None


class Found(NamedTuple):
    """Vectors that a family has found in a file.

    Attributes:
        keys: key of the vectors of each text encoder.
        token: the token, if the keys name it.
    """

    keys: tuple[str, ...]
    token: str | None = None


class Family(Protocol):
    """What a module of this package has that is a family: ``a1111``, ``diffusers``, ``onetrainer``, ``sdxl``."""

    def tensors(self, token: str, vectors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Tensors of a file by their keys.

        Args:
            token: the token as used in prompts.
            vectors: (n, width) per text encoder.
        """

    def find(self, keys: frozenset[str], source: Path) -> Found | None:
        """Vectors among the keys of a file, None if the file is of another family.

        Args:
            keys: all keys of the file.
            source: the file, for messages.
        """
