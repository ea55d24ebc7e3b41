"""Atomic writing of files, which appear whole or not at all, and the folders of runs."""

from __future__ import annotations

import errno
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tokenlearn.errors import UserError, reason_of, shown

_TEMPORARY = re.compile(r"\..+-[0-9a-f]{12}(\.\w+)?")
_LEFT_AFTER = 3600  # seconds
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a Path has one slash where an address has two


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
        UserError: if the folder cannot be created or written to, the disk is full, or ``path`` is a folder or remote.
    """
    refuse_remote(path)
    target = Path(path)
    # Not tempfile.mkstemp: it makes files that only their owner may read, and os.replace preserves that.
    temporary = target.with_name(f".{target.stem}-{uuid.uuid4().hex[:12]}{target.suffix}")
    try:
        if target.is_dir():
            raise UserError(f"cannot write the file '{target}': a folder of that name exists; choose another name")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode & 0o777
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError for a name with a zero byte
        reason = getattr(error, "strerror", None) or reason_of(error)
        if getattr(error, "errno", None) == errno.ENAMETOOLONG and os.path.isdir(target.parent):
            raise UserError(f"cannot write {shown(target.name)} ({reason}); give a shorter name") from None
        raise UserError(
            f"cannot write to {shown(target.parent, 200)} ({reason}); choose another output folder"
        ) from None
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors replaces the file by one that only its owner may read
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write '{target}' ({reason_of(error)}); make room, or choose another output folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Make a folder, and a file in it, which is removed again.

    Raises:
        UserError: if one cannot be made.
    """
    probe = folder / f".writable-{uuid.uuid4().hex[:12]}"  # of this process alone, since several may look at once
    with atomic_write(probe) as temporary:
        temporary.touch()
    probe.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of files that they were writing, at least an hour ago."""
    for left in folder.rglob(".*"):
        if _TEMPORARY.fullmatch(left.name) and left.is_file() and time.time() - left.stat().st_mtime > _LEFT_AFTER:
            left.unlink(missing_ok=True)


def new_folder(path: Path) -> Path:
    """Make a folder that is there for nobody else: with a number added to its name if there is one of the name.

    Raises:
        UserError: if it cannot be made.
    """
    refuse_remote(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder, number = path, 1
        while True:
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                number += 1
                folder = path.with_name(f"{path.name}-{number}")
    except OSError as error:
        raise UserError(
            f"cannot write to '{path.parent}' ({error.strerror}); choose another output folder with --output_dir"
        ) from None


def refuse_remote(path: str | os.PathLike[str]) -> None:
    """Refuse an address such as ``s3://bucket/run``, which would become a local folder named ``s3:``.

    Raises:
        UserError: for an address.
    """
    if _REMOTE.match(os.fspath(path)):
        raise UserError(
            f"'{os.fspath(path)}' is not a local folder; write to a local one and copy it, or mount the remote one"
        )
