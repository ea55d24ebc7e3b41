"""Atomic writing of files: a file appears whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenlearn.errors import UserError


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the target's folder and rename it to ``path`` when the block succeeds.

    The temporary file has the target's suffix, because some writers choose their format by it. If the block raises,
    the temporary file is removed and an existing file at ``path`` is left unchanged.

    Args:
        path: file to write; its folder is created if it does not exist.

    Yields:
        An existing, empty file beside the target, for the block to write to.

    Raises:
        UserError: if the folder cannot be created or written to, or ``path`` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise UserError(f"cannot write the file '{target}': a folder of that name exists; choose another name")
    # Not tempfile.mkstemp: it makes files that only their owner may read, and os.replace preserves that.
    temporary = target.with_name(f".{target.stem}-{uuid.uuid4().hex[:12]}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise UserError(
            f"cannot write to '{target.parent}' ({error.strerror}); choose another output folder"
        ) from None
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
