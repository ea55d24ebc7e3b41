"""Pickles (``.pt``, ``.bin``), read without running any code in them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import nn

from tokenlearn.errors import UserError

SUFFIXES = (".pt", ".bin", ".pth", ".ckpt")


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
        with torch.serialization.safe_globals([nn.ParameterDict]):
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        if "GLOBAL" in str(error):
            raise UserError(
                f"'{source}' is a pickle with more than tensors in it, which could run code and was not loaded; "
                "ask for a .safetensors file"
            ) from None
        raise UserError(f"'{source}' is damaged or no PyTorch file ({type(error).__name__}); copy it again") from None


def _unpacked(source: Path, most_bytes: int) -> tuple[int, bytes]:
    """Size of a file's records when they are unpacked, and its pickled program; of an old file, all of it."""
    with source.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # as torch.load tells both kinds apart
            return source.stat().st_size, source.read_bytes()
    with zipfile.ZipFile(source) as archive:
        size = sum(record.file_size for record in archive.infolist())
        names = [name for name in archive.namelist() if name.endswith("data.pkl")] if size <= most_bytes else []
        return size, b"".join(archive.read(name) for name in names)
