"""Tables of images: CSV files with a column of paths, and columns of labels or whatever else."""

from __future__ import annotations

import csv
import hashlib
import io
from pathlib import Path
from typing import Any

from tokenlearn.errors import UserError, reason_of, shown

PATH_COLUMNS = ("image", "path", "file_name", "file", "filename")
"""Names of the column of paths; the first that a table has counts, and becomes ``image``."""

_DELIMITERS = ",;\t"


def read_image_table(path: Path) -> tuple[Any, str]:
    """Read a table of images.

    Args:
        path: CSV file in UTF-8 with a line of column names, its columns separated by commas, semicolons or tabs.
            Paths are relative to the folder of the file.

    Returns:
        A ``Dataset`` with the column ``image`` of paths and the other columns as texts, empty ones null; and a
        fingerprint of the table and of names, sizes and times of the images.

    Raises:
        UserError: if the file cannot be read, has no column of paths, or a row has more entries than columns.
    """
    import datasets  # type: ignore[import-untyped]

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the table '{path}' ({reason_of(error)}); save it as CSV in UTF-8") from error
    try:
        names, rows = _rows(text)
    except csv.Error as error:
        raise UserError(f"cannot read the table '{path}' ({reason_of(error)}); save it as CSV in UTF-8") from error
    column = next((name for name in PATH_COLUMNS if name in names), None)
    if column is None:
        raise UserError(
            f"the table '{path}' has no column of images among {shown(', '.join(names))}; name it path, as in a first "
            "line 'path,label'"
        )
    columns: dict[str, list[str | None]] = {name: [] for name in names if name}
    for number, row in enumerate(rows, 1):
        if "" in row and any(row[""] or ()):
            raise UserError(
                f"row {number} of the table '{path}' has more entries than the first line has columns; put "
                "entries with a comma in double quotes"
            )
        for name, entries in columns.items():
            entries.append((row[name] or "").strip() or None)
    images = [None if entry is None else str(path.parent / Path(entry).expanduser()) for entry in columns.pop(column)]
    if not images:
        raise UserError(f"the table '{path}' has no rows; add a line for each image")
    digest = hashlib.blake2b(text.encode(), digest_size=8)
    for image in filter(None, images):
        digest.update(_stamp(Path(image)).encode())
    texts = datasets.Features({name: datasets.Value("string") for name in ("image", *columns)})
    return datasets.Dataset.from_dict({"image": images, **columns}, features=texts), digest.hexdigest()


def _rows(text: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the columns, and each row by them; what is superfluous in a row is a list below an empty name."""
    delimiter = max(_DELIMITERS, key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="")
    return list(reader.fieldnames or ()), list(reader)


def _stamp(image: Path) -> str:
    """Size and time of a file; empty if there is none, which reading it will tell."""
    try:
        found = image.stat()
    except (OSError, ValueError):
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"
