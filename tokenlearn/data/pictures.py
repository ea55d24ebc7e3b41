"""Pictures to edit: files of any size in a folder, or generated ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tokenlearn.data.images import to_rgb, unit_range
from tokenlearn.errors import UserError, reason_of


def generated_name(index: int, prompt: str, seed: int) -> str:
    """What a generated picture's file is called, such as ``003-a-portrait-of-a-king-seed7``."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
    return f"{index:03d}-{words}-seed{seed}"


class Picture(NamedTuple):
    """A picture to edit.

    Attributes:
        name: what its edits are called, with folders, without extension.
        size: width and height that its edits should have, in pixels.
        image: (1, 3, H, W) in [0, 1] at a size that the model takes; None where it is to be generated.
        prompt: what to generate.
        seed: seed of the initial latents.
    """

    name: str
    size: tuple[int, int]
    image: Tensor | None
    prompt: str = ""
    seed: int = 0


class Pictures(Protocol):
    """Numbered pictures, read or specified when they are asked for.

    Attributes:
        names: the name of each.
    """

    names: list[str]

    def __getitem__(self, index: int) -> Picture:
        """One picture."""


class FolderPictures:
    """Pictures of a folder in any depth, resized to a size near that at which a model was trained.

    A picture is named by its path below the folder without the extension, or with it where that alone tells two apart.
    Hidden files and folders do not count.

    Args:
        source: folder, or one picture.
        short_side: pixels of the shorter side; proportions are kept.
        multiple: number of which both sides must be multiples.

    Attributes:
        files: the files, sorted.

    Raises:
        UserError: if there is no picture.
    """

    def __init__(self, source: str, short_side: int, multiple: int) -> None:
        root = Path(source).expanduser()
        if root.is_file():
            self.files, root = [root], root.parent
        elif root.is_dir():
            self.files = _picture_files(root)
        else:
            raise UserError(f"'{source}' does not exist; name a folder of pictures, or one picture")
        if not self.files:
            raise UserError(f"folder '{source}' has no pictures; put PNG or JPEG files there, or name another folder")
        self.short_side, self.multiple = short_side, multiple
        paths = [file.relative_to(root) for file in self.files]
        # Some file systems take upper and lower case for the same.
        shared = Counter(str(path.with_suffix("")).casefold() for path in paths)
        self.names = [
            (path if shared[str(path.with_suffix("")).casefold()] > 1 else path.with_suffix("")).as_posix()
            for path in paths
        ]

    def __getitem__(self, index: int) -> Picture:
        """One picture, upright and in RGB.

        Raises:
            UserError: if it cannot be read.
        """
        path = self.files[index]
        try:
            with Image.open(path) as opened:
                image = to_rgb(ImageOps.exif_transpose(opened))
        except Exception as error:  # decoders raise all sorts
            raise UserError(f"cannot read picture '{path}' ({reason_of(error)}); remove or replace it") from error
        scale = self.short_side / min(image.size)
        width, height = (max(1, round(side * scale / self.multiple)) * self.multiple for side in image.size)
        resized = image.resize((width, height), Image.Resampling.LANCZOS)
        return Picture(self.names[index], image.size, unit_range([torch.from_numpy(np.array(resized))]))


class GeneratedPictures:
    """Pictures to generate: every prompt with every seed.

    Args:
        prompts: prompts.
        seeds: seeds of the initial latents.
        side: width and height in pixels.

    Raises:
        UserError: if there are no seeds.
    """

    def __init__(self, prompts: Sequence[str], seeds: Sequence[int], side: int) -> None:
        if not seeds:
            raise UserError("model.seeds is empty; give at least one")
        self.side = side
        self.specified = [(prompt, seed) for prompt in prompts for seed in seeds]
        self.names = [generated_name(index, prompt, seed) for index, prompt in enumerate(prompts) for seed in seeds]

    def __getitem__(self, index: int) -> Picture:
        """One picture, as a prompt and a seed."""
        return Picture(self.names[index], (self.side, self.side), None, *self.specified[index])


def _picture_files(root: Path) -> list[Path]:
    readable = {suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN}
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in readable
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
