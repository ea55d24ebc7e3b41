"""Previews: images of tokens beside their files, which AUTOMATIC1111, Forge, SD.Next and ComfyUI show."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tokenlearn.files import atomic_write
from tokenlearn.notices import notice

if TYPE_CHECKING:
    from PIL import Image

_SUFFIX = ".preview.png"
_KEY = "tokenlearn token"
"""Text entry of a preview that names its token."""


def preview_path(embedding: Path) -> Path:
    """The preview of an embedding file: ``pirate-tl.preview.png`` beside ``pirate-tl.safetensors``."""
    return embedding.with_name(f"{embedding.stem}{_SUFFIX}")


def write_preview(embedding: Path, token: str, image: Image.Image) -> Path | None:
    """Write an image of a token beside its file, whole or not at all.

    An image that is there and is not of this token, such as one that the user put there, is left and said.

    Args:
        embedding: the token's file.
        token: the token.
        image: the image.

    Returns:
        The preview; None if another image was left in its place.

    Raises:
        UserError: if the folder is not writable.
    """
    from PIL.PngImagePlugin import PngInfo

    target = preview_path(embedding)
    if target.exists() and _token_of(target) != token:
        notice(f"'{target}' is no preview of {token} by tokenlearn, and was left as it is")
        return None
    info = PngInfo()
    info.add_itxt(_KEY, token)
    with atomic_write(target) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
    return target


def copy_previews(source: Path, target: Path) -> None:
    """Copy the previews of one folder that another lacks.

    Args:
        source: folder of embedding files; nothing happens if it is missing.
        target: the other folder.
    """
    for path in sorted(source.glob(f"*{_SUFFIX}")):
        copied = target / path.name
        if not copied.exists() and _token_of(path) is not None:
            with atomic_write(copied) as temporary:
                shutil.copyfile(path, temporary)


def _token_of(path: Path) -> str | None:
    """The token that a preview is of; None for other files."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            found = image.info.get(_KEY)
    except (OSError, ValueError, SyntaxError):  # of Pillow, for broken files
        return None
    return None if found is None else str(found)
