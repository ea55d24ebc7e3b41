"""Pickles (``.pt``, ``.bin``), read without running any code in them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tokenlearn.errors import UserError

SUFFIXES = (".pt", ".bin", ".pth", ".ckpt")


def read_pickle(source: Path) -> object:
    """The object in a pickle, by ``torch.load`` with ``weights_only=True``.

    Raises:
        UserError: if the file is damaged, or holds other objects than tensors and containers.
    """
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
