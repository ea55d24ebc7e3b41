"""Labelled images in one array, each decoded once, and parts of them that share no image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenlearn.data.image_source import ImageSource
from tokenlearn.data.pixels import read_image, square_pixels
from tokenlearn.data.prefetch import prefetch
from tokenlearn.data.rows import row_name
from tokenlearn.errors import UserError, reason_of
from tokenlearn.files import atomic_write
from tokenlearn.notices import warn_once
from tokenlearn.progress import progress

_ARRAY, _ABOUT = "images.npy", "images.json"


@dataclass(frozen=True)
class ImageArrays:
    """Labelled images.

    Attributes:
        pixels: (N, S, S, 3) uint8, on disk.
        labels: (N,) class indices.
        names: N names of images.
        class_names: class names in the order of class indices.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: list[str]
    class_names: list[str]

    def counts(self) -> NDArray[np.int64]:
        """Images of each class (K,)."""
        return np.bincount(self.labels, minlength=len(self.class_names))


class Parts(NamedTuple):
    """Rows (n,) of three parts of the images, in which every class has its share."""

    guide: NDArray[np.int64]
    judge: NDArray[np.int64]
    test: NDArray[np.int64]


def read_arrays(
    found: ImageSource, *, source: str, column: str, size: int, folder: Path, key: str, num_workers: int = 2
) -> ImageArrays:
    """Decode labelled images, or take those that were decoded before.

    Images that cannot be decoded or have no label, and copies of others, are left out with one warning.

    Args:
        found: the images.
        source: name of the data, for messages.
        column: column of the classes: names, or indices of named classes.
        size: height and width in pixels; the shorter side is resized to it, and the centre cropped.
        folder: where the arrays are kept.
        key: what the arrays depend on; those of another key are made again.
        num_workers: threads that decode.

    Raises:
        UserError: if there is no such column, or no image can be used.
    """
    if (kept := _kept(folder, key)) is not None:
        return kept
    dataset = found.open()
    names, labels = _classes(dataset, column, source)

    def decode(index: int) -> NDArray[np.uint8] | str:
        row = dataset[index]
        try:
            return square_pixels(read_image(row["image"]), size).numpy()
        except Exception as error:  # decoders raise errors of many kinds
            return f"'{_name(row, index, source)}' ({reason_of(error)})"

    with atomic_write(folder / _ARRAY) as temporary:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(len(dataset), size, size, 3))
        left_out = _LeftOut()
        rows: list[int] = []
        decoded = prefetch(decode, range(len(dataset)), workers=num_workers, depth=64)
        for index, image in enumerate(progress(decoded, "Reading images", unit="image", total=len(dataset))):
            if left_out.takes(image, labels[index]):
                assert not isinstance(image, str)
                array[len(rows)] = image
                rows.append(index)
        array.flush()
        del array
    left_out.warn(source)
    if not rows:
        raise UserError(
            f"none of the {len(dataset)} images of '{source}' can be used{left_out.example}; remove or replace them"
        )
    paths = dataset.select_columns(["image"])
    about = {
        "key": key,
        "class_names": names,
        "labels": [labels[row] for row in rows],
        "names": [_name(paths[row], row, source) for row in rows],
    }
    with atomic_write(folder / _ABOUT) as temporary:
        temporary.write_text(json.dumps(about))
    arrays = _kept(folder, key)
    assert arrays is not None
    return arrays


def split_parts(labels: NDArray[np.int64], *, test_share: float, seed: int) -> Parts:
    """Part the images of each class: a share for the test, and half of the rest each for two trainings.

    Args:
        labels: (N,) class indices.
        test_share: share of the images of each class, above 0 and below 1; one image at least.
        seed: of the choice.
    """
    guide, judge, test = [], [], []
    for label in np.unique(labels):
        rows = np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))
        of_test = max(1, round(test_share * len(rows)))
        half = of_test + (len(rows) - of_test + 1) // 2
        test.append(rows[:of_test])
        guide.append(rows[of_test:half])
        judge.append(rows[half:])
    return Parts(*(np.sort(np.concatenate(part)) for part in (guide, judge, test)))


class _LeftOut:
    """Counts images that cannot be used, by reason."""

    def __init__(self) -> None:
        self.broken: list[str] = []
        self.unlabelled = self.copies = self.contradictions = 0
        self._labels: dict[bytes, int] = {}

    def takes(self, image: NDArray[np.uint8] | str, label: int | None) -> bool:
        """Whether an image is new and can be used; else it is counted."""
        if isinstance(image, str):
            self.broken.append(image)
            return False
        if label is None:
            self.unlabelled += 1
            return False
        digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        if digest in self._labels:
            self.copies += 1
            self.contradictions += self._labels[digest] != label
            return False
        self._labels[digest] = label
        return True

    @property
    def example(self) -> str:
        """The first broken image, in a form to follow a sentence."""
        return f", such as {self.broken[0]}" if self.broken else ""

    def warn(self, source: str) -> None:
        """Warn of all of them in one line, if there are any."""
        parts = []
        if self.broken:
            parts.append(f"{len(self.broken)} images that cannot be read{self.example}")
        if self.unlabelled:
            parts.append(f"{self.unlabelled} without a label")
        if self.copies:
            other = f", {self.contradictions} of them with another label" if self.contradictions else ""
            parts.append(f"{self.copies} copies of other images{other}")
        if parts:
            warn_once(f"left out of '{source}': {'; '.join(parts)}")


def _classes(dataset: Any, column: str, source: str) -> tuple[list[str], list[int | None]]:  # noqa: ANN401
    """Class names, and the class index of each row, None where it is not known."""
    if column not in dataset.features:
        others = [name for name in dataset.features if name != "image"]
        hint = f"name it by --label_column, one of {', '.join(others)}" if others else "it has no other columns"
        raise UserError(
            f"'{source}' has no labels in a column '{column}'; put the images of each of two or more classes into a "
            f"folder of its name, or give a CSV file with the columns path,label; {hint}"
        )
    values = dataset[column][:]
    names = getattr(dataset.features[column], "names", None)
    if names is None:
        texts = [None if value is None else str(value) for value in values]
        names = sorted({text for text in texts if text is not None})
        places = {name: place for place, name in enumerate(names)}
        return names, [None if text is None else places[text] for text in texts]
    return list(names), [None if value is None or value < 0 else int(value) for value in values]


def _name(row: Any, index: int, source: str) -> str:  # noqa: ANN401 - datasets has no types
    """Name of a row's image below the folder of the data, or of the table."""
    folder = Path(source).expanduser()
    return row_name(row, index, "image", str(folder.parent if folder.is_file() else folder))


def _kept(folder: Path, key: str) -> ImageArrays | None:
    """Arrays of a key that were decoded before."""
    try:
        about = json.loads((folder / _ABOUT).read_text())
        if about["key"] != key:
            return None
        pixels: NDArray[np.uint8] = np.load(folder / _ARRAY, mmap_mode="r")
    except (OSError, ValueError, KeyError):
        return None
    labels: Sequence[int] = about["labels"]
    return ImageArrays(pixels[: len(labels)], np.asarray(labels, np.int64), about["names"], about["class_names"])
