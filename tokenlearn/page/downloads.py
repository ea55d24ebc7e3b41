"""Files that the page offers: images, a config, a token, in a temporary folder that goes with the process."""

from __future__ import annotations

import shutil
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

from PIL import Image

_KEPT = 64  # the browser's server copies each file when it is offered


class Downloads:
    """Folders for files that are offered, of which the last ones are kept."""

    def __init__(self) -> None:
        self._root = TemporaryDirectory(prefix="tokenlearn-page-")
        self._folders: deque[Path] = deque()
        self._lock = threading.Lock()
        self._made = 0

    def new_folder(self) -> Path:
        """An empty folder."""
        with self._lock:
            self._made += 1
            folder = Path(self._root.name) / str(self._made)
            folder.mkdir()
            self._folders.append(folder)
            old = self._folders.popleft() if len(self._folders) > _KEPT else None
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        return folder

    def images(self, images: Sequence[Image.Image], names: Sequence[str]) -> Path:
        """A PNG file of an image, or a ZIP file of several.

        Args:
            images: at least one image.
            names: file name of each without its suffix.
        """
        folder = self.new_folder()
        paths = [folder / f"{name}.png" for name in names]
        for path, image in zip(paths, images, strict=True):
            image.save(path)
        if len(paths) == 1:
            return paths[0]
        archive = folder / "images.zip"
        with ZipFile(archive, "w") as opened:
            for path in paths:
                opened.write(path, path.name)
        return archive

    def text(self, text: str, name: str) -> Path:
        """A file of text."""
        path = self.new_folder() / name
        path.write_text(text, encoding="utf-8")
        return path
