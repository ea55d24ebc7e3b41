"""Safetensors files as arrays, without torch: read key by key, and written with one result for one content.

The library's writer puts metadata in another order each time, which changes the hash that programs know files by.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from tokenlearn.errors import UserError, reason_of, shown

Array = npt.NDArray[Any]

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items() if name != "BF16"}


def read_arrays(source: Path, wanted: Callable[[list[str]], Iterable[str]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Arrays of a file by their keys, and its metadata.

    Args:
        source: the file.
        wanted: the keys to read, of all keys. The others are there without an array.

    Returns:
        Key to array, to None where it was not wanted, or to a word for the kind of numbers if numpy has none for it;
        and the text entries.

    Raises:
        UserError: if the file is damaged or no safetensors file.
    """
    try:
        with safe_open(source, framework="np") as file:  # checks the whole header, offsets and sizes
            keys, metadata = list(file.keys()), dict(file.metadata() or {})
        with source.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
            arrays: dict[str, Any] = dict.fromkeys(keys)
            for key in wanted(keys):
                arrays[key] = _array(stream, header[key], 8 + size)
        return arrays, metadata
    except UserError:
        raise
    except Exception as error:  # a damaged header can fail in any way
        raise UserError(
            f"'{source}' is not a whole safetensors file ({shown(reason_of(error))}); copy or export it again"
        ) from None


def _array(stream: Any, entry: Mapping[str, Any], start: int) -> Array | str:  # noqa: ANN401 - an open file
    if entry["dtype"] not in _DTYPES:
        return f"{entry['dtype']} number"
    begin, end = entry["data_offsets"]
    stream.seek(start + begin)
    array: Array = np.frombuffer(stream.read(end - begin), _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    if entry["dtype"] == "BF16":  # the upper half of a float32
        return (array.astype("<u4") << 16).view("<f4")
    return array


def write_arrays(target: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write a file whose bytes depend on arrays and metadata alone, not on their order.

    Args:
        target: the file.
        arrays: by key. They are stored widest numbers first and then by key, as the library stores them.
        metadata: text entries.
    """
    stored = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position, blocks = 0, []
    for key in sorted(stored, key=lambda key: (-stored[key].itemsize, key)):
        block = stored[key].astype(stored[key].dtype.newbyteorder("<")).tobytes()
        header[key] = {
            "dtype": _NAMES[stored[key].dtype.newbyteorder("<")],
            "shape": list(stored[key].shape),
            "data_offsets": [position, position + len(block)],
        }
        position += len(block)
        blocks.append(block)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight bytes
    target.write_bytes(b"".join([struct.pack("<Q", len(text)), text, *blocks]))
