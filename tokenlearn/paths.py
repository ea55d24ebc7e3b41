"""Paths of the configs and checkpoints that travel with the package."""

from __future__ import annotations

import os
from pathlib import Path

from tokenlearn.errors import UserError, shown

_PACKAGE = Path(__file__).parent
_FOLDERS = ("configs", "checkpoints")


def bundled_root() -> Path:
    """The folder that holds ``configs/`` and ``checkpoints/``: inside an installed wheel, else the repository."""
    bundled = _PACKAGE / "bundled"
    return bundled if bundled.is_dir() else _PACKAGE.parent


def resolve(path: str | os.PathLike[str]) -> str:
    """The place of a file or folder that the user names.

    Configs name bundled files by paths relative to the repository, such as ``checkpoints/portraits``. These must work
    in every working directory and from an installed wheel.

    Args:
        path: a path, or a name of another kind such as a hub id.

    Returns:
        ``path`` with ``~`` expanded if it exists; else the bundled file or folder of this name, if there is one; else
        ``path``, so the caller can try it as a hub id or report it.

    Raises:
        UserError: if the path is empty, or the operating system cannot look for it, because it is too long for
            instance.
    """
    if not os.fspath(path).strip():  # which would be the current folder
        raise UserError("the name of a file or folder is empty; name one, or leave the setting out")
    try:
        local = Path(path).expanduser()
        exists = local.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"cannot look for the path {shown(path)} ({reason}); correct it") from None
    if exists:
        return str(local)
    if local.parts[:1] not in {(folder,) for folder in _FOLDERS}:
        return str(path)
    bundled = bundled_root() / local
    return str(bundled) if bundled.exists() else str(path)


def bundled_configs() -> list[str]:
    """Short names of the bundled configs, as ``--config`` accepts them: ``quickstart``, ``portraits/sega``."""
    folder = bundled_root() / "configs"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def resolve_config(name: str) -> Path:
    """The config file that ``--config`` names.

    Args:
        name: a path, or the name of a bundled config with or without its folder and suffix: ``quickstart``,
            ``portraits/sega`` and ``configs/portraits/sega.yaml`` are accepted.

    Returns:
        An existing file. A local file takes precedence over a bundled config.

    Raises:
        UserError: if there is neither.
    """
    for form in (name, f"configs/{name}", f"configs/{name}.yaml"):
        path = Path(resolve(form)).expanduser()
        if path.is_file():
            return path
    raise UserError(
        f"no config file '{name}'; give the path of a YAML file or a config of the package: "
        f"{', '.join(bundled_configs())}"
    )
