"""Pickles (``.pt``, ``.bin``), read without running any code in them."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from tokenlearn.errors import UserError, shown
from tokenlearn.tokens.files.safetensors_files import Array

SUFFIXES = (".pt", ".bin", ".pth", ".ckpt")
_MOST_OPERATIONS = 10_000  # of a pickle that holds a token


def read_pickle(source: Path, most_bytes: int) -> object:
    """The object in a pickle, by ``torch.load`` with ``weights_only=True``.

    Args:
        source: the file.
        most_bytes: largest size of what a compressed file unpacks to.

    Raises:
        UserError: if the file is damaged, holds other objects than tensors and containers, or unpacks to more.
    """
    try:
        unpacked, program = _unpacked(source, most_bytes)
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"'{source}' is damaged or no PyTorch file ({type(error).__name__}); copy it again") from None
    if unpacked > most_bytes:
        raise UserError(f"'{source}' unpacks to {unpacked} bytes, more than any embedding; ask for another file")
    if b"bytearray" in program:  # of the few calls that torch.load lets a pickle make, the one that takes a size
        raise UserError(f"'{source}' is a pickle with more than tensors in it; ask for a .safetensors file")
    try:
        # Early embeddings have their tensor in a ParameterDict, a class that only holds tensors.
        with torch.serialization.safe_globals([nn.ParameterDict]), source.open("rb") as file:
            stream: BinaryIO = file if zipfile.is_zipfile(source) else io.BytesIO(_without_sources(file.read()))
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        if "GLOBAL" in str(error):
            raise UserError(
                f"'{source}' is a pickle with more than tensors in it, which could run code and was not loaded; "
                "ask for a .safetensors file"
            ) from None
        raise UserError(f"'{source}' is damaged or no PyTorch file ({type(error).__name__}); copy it again") from None


def _without_sources(content: bytes) -> bytes:
    """A file of PyTorch's first form with the classes of modules in it as plain names.

    This form has the source text of each class of a module, by a call that ``weights_only`` refuses, though it only
    compares the text with that of the class. What remains is for ``torch.load`` to judge, as in any other file.
    """
    stream = io.BytesIO(content)
    pieces: list[bytes] = []
    done = 0
    for _ in range(4):  # magic number, version and system before the content itself
        parsed = islice(pickletools.genops(stream), _MOST_OPERATIONS)
        operations = [(code.name, value, int(place or 0)) for code, value, place in parsed]
        if operations[-1][0] != "STOP":
            return content  # more than any embedding
        begin = 0
        for index, (name, _value, _place) in enumerate(operations):
            if name == "MARK":
                begin = index
            elif name == "BINPERSID" and operations[begin + 1][1] == "module":
                first = begin + 2 + (operations[begin + 2][0] in ("BINPUT", "LONG_BINPUT"))
                last = first + 1 + (operations[first + 1][0] in ("BINPUT", "LONG_BINPUT"))
                pieces += [content[done : operations[begin][2]], content[operations[first][2] : operations[last][2]]]
                done = operations[index + 1][2]
    return b"".join([*pieces, content[done:]])


def as_mapping(content: object) -> Mapping[Any, Any] | None:
    """A mapping or a ``ParameterDict`` as a mapping, None for anything else.

    ParameterDicts of PyTorch 1.11 and before lack what theirs has today, and hold their parameters as a module does.
    """
    if isinstance(content, nn.ParameterDict):
        state = vars(content)
        return dict(content.items()) if "_keys" in state else dict(state.get("_parameters") or {})
    return content if isinstance(content, Mapping) else None


def as_array(value: object, key: str, source: Path) -> Array | None:
    """A tensor of a pickle as an array, None for anything else.

    Raises:
        UserError: for a tensor that is not of plain numbers in memory.
    """
    if not isinstance(value, Tensor):
        return None
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_nested or value.is_quantized:
        raise UserError(f"'{source}' has a sparse or empty tensor under {shown(key)}; expected numbers (n, width)")
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise UserError(
            f"'{source}' claims {value.numel()} numbers under {shown(key)} and holds fewer; ask for another file"
        )
    plain = value.detach().resolve_conj()
    return plain.float().numpy() if plain.dtype == torch.bfloat16 else plain.numpy()


def _unpacked(source: Path, most_bytes: int) -> tuple[int, bytes]:
    """Size of a file's records when they are unpacked, and its pickled program; of an old file, all of it."""
    with source.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # as torch.load tells both kinds apart
            return source.stat().st_size, source.read_bytes()
    with zipfile.ZipFile(source) as archive:
        size = sum(record.file_size for record in archive.infolist())
        names = [name for name in archive.namelist() if name.endswith("data.pkl")] if size <= most_bytes else []
        return size, b"".join(archive.read(name) for name in names)
