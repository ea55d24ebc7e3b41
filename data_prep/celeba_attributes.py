"""A CelebA-style attribute file as metadata of the folder of its images, for ``ImageDataModule``.

``uv run python -m data_prep.celeba_attributes --attribute_file list_attr_celeba.txt --image_folder img_align_celeba``
writes ``metadata.jsonl`` into the folder. Then ``--data.source img_align_celeba`` and
``--data.labels.columns '{smile: Smiling}'`` learn from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from jsonargparse import auto_cli

from tokenlearn.errors import UserError
from tokenlearn.files import atomic_write

_VALUES = {"1": True, "-1": False, "0": False}


def read_attributes(attribute_file: Path) -> Iterator[tuple[str, dict[str, bool]]]:
    """File names and their attributes.

    Args:
        attribute_file: ``list_attr_celeba.txt`` as published: number of images, a line of names, and for each image
            a line of its file name and 1 or -1; or the same as CSV with a header that begins with ``image_id``.

    Yields:
        Name of an image file, and whether it has each attribute.

    Raises:
        UserError: if the file is missing, cut off or of another form.
    """
    try:
        lines = [re.split(r"[,\s]+", line.strip()) for line in attribute_file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read '{attribute_file}' ({error}); give CelebA's list_attr_celeba.txt") from None
    count = int(lines.pop(0)[0]) if lines and len(lines[0]) == 1 and lines[0][0].isdecimal() else None
    if not lines:
        raise UserError(f"'{attribute_file}' names no attributes; give CelebA's list_attr_celeba.txt")
    names, *rows = lines
    names = names[1:] if names[0] == "image_id" else names
    if count is not None and count != len(rows):
        raise UserError(f"'{attribute_file}' should have {count} images but has {len(rows)}; download it again")
    for row in rows:
        if len(row) != len(names) + 1 or not set(row[1:]) <= set(_VALUES):
            raise UserError(
                f"'{attribute_file}' should have a file name and {len(names)} times 1 or -1 in each line, not "
                f"'{' '.join(row)[:60]}'; download it again"
            )
        yield row[0], {name: _VALUES[value] for name, value in zip(names, row[1:], strict=True)}


def main(attribute_file: Path, image_folder: Path, attributes: Sequence[str] = ()) -> None:
    """Write ``metadata.jsonl`` for the images that are there.

    Args:
        attribute_file: CelebA's ``list_attr_celeba.txt`` or a CSV file of its contents.
        image_folder: folder of the images.
        attributes: attributes to write; none for all.
    """
    present = {path.name for path in image_folder.glob("*")}
    lines, missing = [], 0
    for name, has in read_attributes(attribute_file):
        if unknown := [attribute for attribute in attributes if attribute not in has]:
            raise UserError(f"no attribute '{unknown[0]}' in '{attribute_file}'; it has {', '.join(has)}")
        missing += name not in present
        if name in present:
            lines.append(json.dumps({"file_name": name} | {key: has[key] for key in attributes or has}))
    if not lines:
        raise UserError(
            f"none of the images of '{attribute_file}' is in '{image_folder}'; give the folder they are in"
        )
    with atomic_write(image_folder / "metadata.jsonl") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    print(f"{image_folder / 'metadata.jsonl'}: {len(lines)} images, {missing} not in the folder left out")


if __name__ == "__main__":
    auto_cli(main)
