"""Images to edit: files of any size from a folder, images in memory, or generated ones."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image, ImageOps
from torch import Tensor

from tokenlearn.data.pixels import rgb_pixels, to_rgb, unit_range, warn_of_left_out
from tokenlearn.errors import MOST_RATIO, UserError, reason_of
from tokenlearn.paths import resolve

_NO_PIXELS = frozenset(
    {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
)  # formats that Pillow recognises and cannot decode


def generated_name(index: int, prompt: str, seed: int) -> str:
    """File name of a generated image without its extension, such as ``003-a-portrait-of-a-king-seed7``."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
    return f"{index:03d}-{words}-seed{seed}"


class EditableImage(NamedTuple):
    """An image to edit.

    Attributes:
        name: file name of its edits, with folders, without extension.
        size: width and height of its edits in pixels.
        image: (1, 3, H, W) in [0, 1] at a size that the model takes; None if the image is to be generated.
        prompt: prompt of an image that is to be generated.
        seed: seed of its initial latents.
        original: the image at its own size, upright and in RGB; None if it is to be generated.
    """

    name: str
    size: tuple[int, int]
    image: Tensor | None
    prompt: str = ""
    seed: int = 0
    original: Image.Image | None = None


class EditableImages(Protocol):
    """Numbered images, each read or specified when it is asked for.

    Attributes:
        names: the name of each.
        prompts: prompts of images that are to be generated.
    """

    names: list[str]
    prompts: Sequence[str]

    def __getitem__(self, index: int) -> EditableImage:
        """One image."""

    def path(self, index: int) -> Path | None:
        """File of an image, None if it is in memory or to be generated."""

    def identity(self, index: int) -> str:
        """Text that differs for different images: a hash of the content, or prompt, seed and size."""


class FolderImages:
    """Images of a folder in any depth, or images in memory, resized to a size near the model's.

    The name of a file is its path below the folder without the extension, or with it where two files differ in nothing
    else. Hidden files and folders are left out. Images in memory are named ``image-000`` and so on.

    Args:
        source: a folder, a file, an image, or images.
        short_side: length of the shorter side in pixels; proportions are preserved.
        multiple: number of which both sides are made multiples.

    Raises:
        UserError: if there is no image.
    """

    def __init__(
        self, source: str | Path | Image.Image | Sequence[Image.Image], short_side: int, multiple: int
    ) -> None:
        self.short_side, self.multiple = short_side, multiple
        self.prompts: Sequence[str] = ()
        self.images: Sequence[Path | Image.Image]
        if isinstance(source, str | Path):
            self.images, self.names = _files(source)
        else:
            self.images = [source] if isinstance(source, Image.Image) else list(source)
            self.names = [f"image-{index:03d}" for index in range(len(self.images))]
            if not self.images:
                raise UserError("there are no images to edit; give at least one")

    def __getitem__(self, index: int) -> EditableImage:
        """One image, upright and in RGB.

        Raises:
            UserError: if its file cannot be read, or one side is more than eight times as long as the other.
        """
        source = self.images[index]
        image = _upright_rgb(source) if isinstance(source, Image.Image) else _read(source)
        if max(image.size) > MOST_RATIO * min(image.size):  # its longer side would be thousands of pixels
            raise UserError(
                f"image '{self.names[index]}' has {image.width}x{image.height} pixels; crop it, so that one side is "
                f"at most {MOST_RATIO} times as long as the other"
            )
        scale = self.short_side / min(image.size)
        width, height = (max(1, round(side * scale / self.multiple)) * self.multiple for side in image.size)
        resized = image.resize((width, height), Image.Resampling.LANCZOS)
        return EditableImage(self.names[index], image.size, unit_range([rgb_pixels(resized)]), original=image)

    def path(self, index: int) -> Path | None:
        """File of an image, None if it is in memory."""
        source = self.images[index]
        return source if isinstance(source, Path) else None

    def identity(self, index: int) -> str:
        """Hash of an image's file, or of its pixels."""
        source = self.images[index]
        content = source.read_bytes() if isinstance(source, Path) else source.tobytes()
        return hashlib.blake2b(content, digest_size=12).hexdigest()


class GeneratedImages:
    """Images to generate: every prompt with every seed.

    Args:
        prompts: prompts.
        seeds: seeds of the initial latents.
        size: width and height in pixels, or one number for both.

    Raises:
        UserError: if there are no prompts or no seeds.
    """

    def __init__(self, prompts: Sequence[str], seeds: Sequence[int], size: int | tuple[int, int]) -> None:
        if not prompts or not seeds:
            raise UserError(f"model.{'seeds' if prompts else 'prompts'} is empty; give at least one")
        self.size = (size, size) if isinstance(size, int) else size
        self.prompts: Sequence[str] = prompts
        self.specified = [(prompt, seed) for prompt in prompts for seed in seeds]
        self.names = [generated_name(index, prompt, seed) for index, prompt in enumerate(prompts) for seed in seeds]

    def __getitem__(self, index: int) -> EditableImage:
        """One image, as a prompt and a seed."""
        prompt, seed = self.specified[index]
        return EditableImage(self.names[index], self.size, None, prompt, seed)

    def path(self, index: int) -> Path | None:
        """None: there are no files."""
        return None

    def identity(self, index: int) -> str:
        """Prompt, seed and size."""
        prompt, seed = self.specified[index]
        return f"{seed} {self.size[0]}x{self.size[1]} {prompt}"


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            if not all(opened.size):
                raise ValueError("it has no pixels")
            return _upright_rgb(opened)
    except Exception as error:  # decoders raise errors of many kinds
        raise UserError(f"cannot read image '{path}' ({reason_of(error)}); remove or replace it") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    return to_rgb(ImageOps.exif_transpose(image))


def _files(source: str | Path) -> tuple[list[Path], list[str]]:
    """Sorted image files of a folder, or one file, and their names."""
    root = Path(resolve(source)).expanduser()
    if root.is_file():
        files, root = [root], root.parent
    elif root.is_dir():
        files = _image_files(root)
    else:
        raise UserError(f"'{source}' does not exist; name a folder of images, or one image")
    if not files:
        raise UserError(f"folder '{source}' has no images; put PNG or JPEG files there, or name another folder")
    paths = [file.relative_to(root) for file in files]
    # Some file systems do not tell upper from lower case.
    shared = Counter(str(path.with_suffix("")).casefold() for path in paths)
    names = [
        (path if shared[str(path.with_suffix("")).casefold()] > 1 else path.with_suffix("")).as_posix()
        for path in paths
    ]
    return files, names


def _image_files(root: Path) -> list[Path]:
    extensions = Image.registered_extensions().items()
    readable = {suffix for suffix, form in extensions if form in Image.OPEN and form not in _NO_PIXELS}
    found = list(root.rglob("*"))
    warn_of_left_out(found, readable, root)
    return sorted(
        path
        for path in found
        if path.suffix.lower() in readable
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
