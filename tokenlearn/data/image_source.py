"""Data sets of images: a folder, a CSV file, parquet files, a saved data set, the hub, or the bundled world."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenlearn.data.image_table import read_image_table
from tokenlearn.data.pixels import warn_of_left_out
from tokenlearn.errors import UserError, reason_of, shown
from tokenlearn.notices import warn_once
from tokenlearn.paths import resolve

_TABLES = (".csv", ".json", ".jsonl", ".tsv", ".xlsx")

if TYPE_CHECKING:
    from tokenlearn.data.portraits import Scene

_PORTRAITS = "portraits:"
_PORTRAITS_PER_SHARD = 256
_SAVED_SHARDS = 64
_SPLITS = frozenset(
    {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}
)


@dataclass(frozen=True)
class ImageSource:
    """A data set that can be opened again and again.

    Attributes:
        open: opens it as a ``Dataset``, or when streaming as an ``IterableDataset``. Its column of images gives
            ``{"bytes", "path"}``, not decoded.
        fingerprint: differs for different data.
        portraits: whether it is the bundled world.
    """

    open: Callable[[], Any]
    fingerprint: str
    portraits: bool = False


def is_portraits(source: str) -> bool:
    """Whether a source is the bundled world."""
    return source.startswith(_PORTRAITS)


def scenes_of(source: str, numbers: Sequence[int]) -> list[Scene]:
    """The scenes of portraits of the bundled world, by their positions in a source.

    Raises:
        UserError: if the source is not well formed.
    """
    from tokenlearn.data.portraits import portrait, portrait_of_persona

    _, seed, personas = _parsed_portraits(source)
    return [(portrait_of_persona if personas else portrait)(seed, number)[0] for number in numbers]


def open_images(
    source: str, *, image_column: str = "image", split: str = "train", streaming: bool = False
) -> ImageSource:
    """Find a data set.

    Args:
        source: a folder of images in any depth, with ``metadata.jsonl`` or a folder per class if wanted; a CSV file
            with a column ``path``, see :func:`tokenlearn.data.image_table.read_image_table`; a folder of parquet
            files, a parquet file or a pattern such as ``data/*.parquet``; a data set that ``save_to_disk`` wrote; a
            hub id, ``owner/name`` or ``owner/name@revision`` with a branch, tag or commit; or for the bundled
            world ``portraits:SIZE`` or ``portraits:SIZE:SEED``, where another seed names other portraits than 0, or
            ``portraits:SIZE:SEED:personas``, where every portrait shows a persona.
        image_column: name of the column of images; files in a folder are in ``image``.
        split: split of the data set. Of a folder of images, the subfolder of this name if there is one, else all.
        streaming: read while iterating instead of preparing the data set first.

    Raises:
        UserError: if there is no such data set, split or column, or it cannot be read.
    """
    if is_portraits(source):
        return _portraits(source, streaming)
    path = Path(resolve(source)).expanduser()
    with _explained(source, split):
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            opened, fingerprint = _saved(path, split, streaming)
        else:
            opened, fingerprint = _built(path, source, split, streaming)

    def open_encoded() -> Any:  # noqa: ANN401 - either kind of data set, neither of which has types
        with _explained(source, split):
            return _encoded(opened(), image_column)

    return ImageSource(open_encoded, f"{fingerprint} {split} {image_column}")


def _portraits(source: str, streaming: bool) -> ImageSource:
    from tokenlearn.data.portraits import portrait, portrait_of_persona, portraits_dataset

    size, seed, personas = _parsed_portraits(source)
    num_shards = -(-size // _PORTRAITS_PER_SHARD)
    opened = partial(portraits_dataset, size, seed, streaming=streaming, num_shards=num_shards, personas=personas)
    first = (portrait_of_persona if personas else portrait)(seed, 0)[1]  # another release may draw it differently
    look = hashlib.blake2b(first.tobytes(), digest_size=8).hexdigest()
    kind = ":personas" if personas else ""
    return ImageSource(lambda: _encoded(opened(), "image"), f"{_PORTRAITS}{size} {seed}{kind} {look}", portraits=True)


def _parsed_portraits(source: str) -> tuple[int, int, bool]:
    """Size, seed, and whether every portrait shows a persona."""
    found = re.fullmatch(r"(?P<size>\d+)(?::(?P<seed>\d+)(?P<personas>:personas)?)?", source.removeprefix(_PORTRAITS))
    if not found or int(found["size"]) == 0:
        raise UserError(
            f"data.source '{source}' needs a number of portraits, such as 'portraits:2000', and may have a seed, such "
            "as 'portraits:2000:1', and be of personas alone, such as 'portraits:2000:1:personas'"
        )
    return int(found["size"]), int(found["seed"] or "0"), found["personas"] is not None


def _saved(path: Path, split: str, streaming: bool) -> tuple[Callable[[], Any], str]:
    import datasets  # type: ignore[import-untyped]

    data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"data set '{path}' has no split '{split}'; set data.split to {' or '.join(data)}")
        data = data[split]
    elif split not in ("train", str(data.split)):
        raise UserError(f"data set '{path}' was saved without splits; leave data.split at train, not '{split}'")
    if streaming:
        num_shards = max(1, min(len(data), _SAVED_SHARDS))
        return partial(data.to_iterable_dataset, num_shards=num_shards), data._fingerprint
    return (lambda: data), data._fingerprint


def _built(path: Path, source: str, split: str, streaming: bool) -> tuple[Callable[[], Any], str]:
    import datasets

    images: int | None = None  # number of images in a folder, of which metadata may name fewer
    name = re.split(r"[\[+]", split)[0]  # of 'train[:100]'
    if path.is_dir():
        builder, images = _folder_builder(path, name)
    elif path.exists() and not path.is_file():
        raise UserError(f"'{source}' is no regular file; set data.source to a folder, a parquet file or a hub id")
    elif path.suffix.lower() in (".csv", ".tsv"):
        return _table(path, split, streaming)
    elif path.suffix == ".parquet":
        builder = datasets.load_dataset_builder("parquet", data_files={name: str(path)})
    elif source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(f"data folder '{source}' does not exist; give an existing folder or a hub id (owner/name)")
    else:
        hub_id, _, revision = source.partition("@")
        builder = datasets.load_dataset_builder(hub_id, revision=revision or None)
    fingerprint = f"{builder.config_id} {builder.hash}"  # of names, sizes and times of local files, commits on the hub
    if streaming:
        return partial(builder.as_streaming_dataset, split=split), fingerprint

    def prepared() -> Any:  # noqa: ANN401 - datasets has no types
        builder.download_and_prepare()
        rows = builder.as_dataset(split=split)
        if images is not None and split == name and len(rows) < images:
            warn_once(
                f"left out of '{source}': {images - len(rows)} of {images} images, which have no row in the "
                "metadata; add rows, or remove the images"
            )
        return rows

    return prepared, fingerprint


def _table(path: Path, split: str, streaming: bool) -> tuple[Callable[[], Any], str]:
    if split != "train":
        raise UserError(f"the table '{path}' has no split '{split}'; leave data.split at train")
    data, fingerprint = read_image_table(path)
    if streaming:
        return partial(data.to_iterable_dataset, num_shards=max(1, min(len(data), _SAVED_SHARDS))), fingerprint
    return (lambda: data), fingerprint


def _folder_builder(path: Path, name: str) -> tuple[Any, int | None]:
    """The builder of a folder, and the number of images in a folder of images."""
    import datasets
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder  # type: ignore[import-untyped]

    folder = path / name if (path / name).is_dir() else path
    files = list(folder.rglob("*"))
    warn_of_left_out(files, ImageFolder.EXTENSIONS, folder)
    images = [file for file in files if file.suffix.lower() in ImageFolder.EXTENSIONS and file.is_file()]
    if images:
        for file in files:
            if file.name == "metadata.jsonl":
                _check_lines(file)
        if folder != path:
            _require_split(path, name, ImageFolder.EXTENSIONS)
        # All files, named: otherwise the loader takes words such as 'test' in their names for splits.
        builder = datasets.load_dataset_builder("imagefolder", data_dir=str(folder), data_files={name: "**"})
        hidden = [file for file in images if any(_is_hidden(part) for part in file.relative_to(folder).parts)]
        return builder, len(images) - len(hidden)
    if any(file.suffix.lower() == ".parquet" for file in files):
        return datasets.load_dataset_builder(str(path)), None
    raise UserError(f"no images in the folder '{folder}'; set data.source to a folder of PNG, JPEG or parquet files")


def _check_lines(file: Path) -> None:
    """Refuse a file of metadata whose lines are not all JSON objects; the loader's parser crashes at some of them."""
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UserError(
                    f"line {number} of '{file}' is {shown(line.strip())}, not a JSON object such as "
                    '{"file_name": "a.png"}; correct it'
                )


def _require_split(path: Path, name: str, suffixes: Collection[str]) -> None:
    """Refuse a folder that is named like the split beside others that are not: it may be a class."""
    others = sorted(
        folder.name
        for folder in path.iterdir()
        if folder.is_dir()
        and folder.name != name
        and folder.name.lower() not in _SPLITS
        and not _is_hidden(folder.name)
        and any(file.suffix.lower() in suffixes for file in folder.rglob("*"))
    )
    if others:
        raise UserError(
            f"'{path}' has images in '{name}', which is the name of the split, and in {', '.join(others[:6])}; set "
            f"data.source to '{path / name}' if it is a split, or rename it if it is a class"
        )


def _is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or one that the loader leaves out, such as ``__MACOSX``."""
    return name.startswith((".", "__"))


def _encoded(dataset: Any, image_column: str) -> Any:  # noqa: ANN401 - either kind of data set
    """The data set with its images as they are stored."""
    import datasets

    if dataset.features is None:  # streams whose files do not name their columns
        dataset = dataset._resolve_features()
    if image_column not in dataset.features:
        raise UserError(
            f"the data have no column '{image_column}'; set data.images.column to one of "
            f"{', '.join(map(shown, sorted(dataset.features))) or 'theirs, of which they have none'}"
        )
    feature = dataset.features[image_column]
    stored = {"string", "large_string", "binary", "large_binary"}
    if not (isinstance(feature, datasets.Image | dict) or getattr(feature, "dtype", None) in stored):
        raise UserError(f"column '{image_column}' holds no images; set data.images.column to one that does")
    return dataset.cast_column(image_column, datasets.Image(decode=False))


@contextmanager
def _explained(source: str, split: str) -> Iterator[None]:
    """Turn errors of loading, which are nearly always in the input, into one line."""
    import datasets

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        generating = isinstance(error, datasets.exceptions.DatasetGenerationError)
        reason = reason_of(error.__cause__ if generating and isinstance(error.__cause__, Exception) else error)
        if "BatchSize must be greater than 0" in reason:
            reason = "it has no rows"
        raise UserError(
            f"cannot load split '{split}' of the data '{source}' ({reason}); check data.source and data.split"
        ) from error


def where_labels_go(source: str, columns: Collection[str]) -> str:
    """The rest of a message about labels that are not there: a table in the folder of the images that is not read.

    Args:
        source: as in :func:`open_images`.
        columns: what the data have.
    """
    folder = Path(resolve(source)).expanduser()
    tables = sorted(path.name for path in folder.glob("*") if path.suffix in _TABLES) if folder.is_dir() else []
    if set(columns) - {"image", "label"}:  # those of the metadata, which is read
        tables = [name for name in tables if not name.startswith("metadata.")]
    if not tables:
        return ""
    return (
        f"; '{tables[0]}' is not read: labels of a folder are in metadata.csv or metadata.jsonl beside the images, "
        "with their names in a column file_name"
    )
