"""Malformed tables of images and labels, as parquet files."""

from __future__ import annotations

import datetime
import decimal
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROWS = 8
ENCODED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def picture(index: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    return Image.new("RGB", size, (25 * index % 256, 90, 150))


GOOD = [encoded(picture(index)) for index in range(ROWS)]
SMILES = [index % 2 for index in range(ROWS)]


def images(contents: list[bytes | None] | None = None) -> pa.Array:
    rows = [{"bytes": content, "path": None} for content in (contents or GOOD)]
    return pa.array(rows, ENCODED)


def table(image: pa.Array | None = None, smile: Any = SMILES) -> pa.Table:
    labels = smile if isinstance(smile, pa.Array) else pa.array(smile)
    return pa.table({"image": images() if image is None else image, "smile": labels})


def parquet(content: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(content, file, **options)
    return file.getvalue()


def damaged_files() -> Iterator[tuple[str, bytes]]:
    """What is no whole parquet file."""
    whole = parquet(table(), compression="none")
    for size in (0, 1, 4, 8, 12, 100, len(whole) // 2, len(whole) - 8, len(whole) - 4, len(whole) - 1):
        yield f"cut at {size}", whole[:size]
    yield "more at the end", whole + b"more"
    yield "zeros", bytes(2000)
    yield "encrypted", whole[:-4] + b"PARE"
    for length in (0, 1, 2**31 - 1, 2**32 - 1):
        yield f"footer of {length}", whole[:-8] + struct.pack("<I", length) + b"PAR1"
    footer = struct.unpack("<I", whole[-8:-4])[0]
    yield "footer of zeros", whole[: -8 - footer] + bytes(footer) + whole[-8:]
    yield "pages of zeros", whole[:4] + bytes(len(whole) - 12 - footer) + whole[-8 - footer :]
    yield "HTML", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "a pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    yield "CSV", b"image,smile\n0.png,1\n"
    yield "JSON", b'{"image": "0.png", "smile": 1}\n'
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.parquet", whole)
    yield "a zip", archive.getvalue()
    arrow = io.BytesIO()
    with pa.ipc.new_file(arrow, table().schema) as writer:
        writer.write_table(table())
    yield "Arrow", arrow.getvalue()


def other_columns() -> Iterator[tuple[str, pa.Table]]:
    """Tables that are not images with a label."""
    smiles = pa.array(SMILES)
    yield "no rows", table().slice(0, 0)
    yield "no columns", pa.table({})
    yield "no images", pa.table({"smile": smiles})
    yield "no labels", pa.table({"image": images()})
    yield "images twice", pa.Table.from_arrays([images(), images(), smiles], ["image", "image", "smile"])
    yield "labels twice", pa.Table.from_arrays([images(), smiles, smiles], ["image", "smile", "smile"])
    yield "a column without a name", pa.Table.from_arrays([images(), smiles], ["", "smile"])


def giant() -> bytes:
    """A PNG of 60000 by 60000 pixels by its header."""
    content = bytearray(encoded(Image.new("RGB", (1, 1))))
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def other_images() -> Iterator[tuple[str, pa.Array]]:
    """Columns of images that hold something else."""
    numbers = list(range(ROWS))
    yield "whole numbers", pa.array(numbers)
    yield "numbers", pa.array([0.5] * ROWS)
    yield "truth values", pa.array([True] * ROWS)
    yield "null", pa.nulls(ROWS)
    yield "null images", images([None] * ROWS)
    yield "null structs", pa.array([None] * ROWS, ENCODED)
    yield "lists of numbers", pa.array([[1, 2, 3]] * ROWS)
    yield "pixels", pa.array([np.zeros((4, 4), dtype=np.uint8).tolist()] * ROWS)
    yield "other structs", pa.array([{"a": 1}] * ROWS)
    yield "structs of numbers", pa.array([{"bytes": 1, "path": 2}] * ROWS)
    yield "times", pa.array([datetime.datetime(2020, 1, 1)] * ROWS)
    yield "decimals", pa.array([decimal.Decimal("1.5")] * ROWS)
    yield "maps", pa.array([[("a", 1)]] * ROWS, pa.map_(pa.string(), pa.int64()))
    yield "words", pa.array(["words"] * ROWS)
    yield "empty words", pa.array([""] * ROWS)
    yield "missing files", pa.array([f"/nowhere/{index}.png" for index in numbers])
    yield "a folder", pa.array(["/"] * ROWS)
    yield "a text file", pa.array(["/etc/hostname"] * ROWS)
    yield "addresses", pa.array(["http://127.0.0.1:9/a.png"] * ROWS)
    yield "addresses of an unknown kind", pa.array(["nonsense://a/b.png"] * ROWS)
    yield "empty bytes", images([b""] * ROWS)
    yield "bytes of words", images([b"words"] * ROWS)
    yield "cut", images([content[:40] for content in GOOD])
    yield "giant", images([giant()] * ROWS)
    yield "tiny", images([encoded(picture(0, (2, 2)))] * ROWS)
    yield "unknown white", images([encoded(Image.fromarray(np.full((20, 24), 99.0, np.float32)), "TIFF")] * ROWS)
    yield "a video", images([b"\x00\x00\x01\xba" + bytes(100)] * ROWS)
    yield "a vector drawing", images([b"<svg xmlns='http://www.w3.org/2000/svg'/>"] * ROWS)


def other_labels() -> Iterator[tuple[str, pa.Array]]:
    """Labels of an attribute that is absent or present which are neither."""

    def with_last(value: Any, kind: pa.DataType | None = None) -> pa.Array:
        zero, one = (0.0, 1.0) if isinstance(value, float) else (0, 1)
        return pa.array([zero, one] * (ROWS // 2 - 1) + [zero, value], kind)

    yield "infinite", with_last(float("inf"))
    yield "minus infinite", with_last(-float("inf"))
    yield "half", with_last(0.5)
    yield "below -1", with_last(-2)
    yield "minus one and one", pa.array([-1, 1] * (ROWS // 2))
    yield "the largest", with_last(2**64 - 1, pa.uint64())
    yield "large", with_last(2**62)
    yield "a third class", with_last(2)
    yield "lists", pa.array([[0, 1]] * ROWS)
    yield "structs", pa.array([{"a": 1}] * ROWS)
    yield "maps", pa.array([[("a", 1)]] * ROWS, pa.map_(pa.string(), pa.int64()))
    yield "bytes", pa.array([b"0", b"1"] * (ROWS // 2))
    yield "times", pa.array([datetime.datetime(2020, 1, 1)] * ROWS)
    yield "durations", pa.array([datetime.timedelta(1)] * ROWS)
    yield "decimals", pa.array([decimal.Decimal("0.5")] * ROWS)
    yield "null", pa.nulls(ROWS)
    yield "null numbers", pa.array([None] * ROWS, pa.int64())
    yield "one name", pa.array(["smiling"] * ROWS)
    yield "three names", pa.array(["a", "b", "c", "a"] * (ROWS // 4))
    yield "names and nothing", pa.array(["", "smile"] * (ROWS // 2))
    yield "numbers as words", pa.array(["-1", "1"] * (ROWS // 2))
    yield "control characters", pa.array(["a\x1b[31m\x00", "smile"] * (ROWS // 2))
    yield "long names", pa.array(["a" * 100_000, "smile"] * (ROWS // 2))
