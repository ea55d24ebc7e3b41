"""Fingerprint of a text encoder's vocabulary, which says whether an embedding fits a model."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from tokenlearn.tokens.injection import input_embedding


def vocabulary_hash(text_encoder: nn.Module) -> str:
    """Short fingerprint of the table of word embeddings beside which tokens are trained.

    The table is compared in bfloat16, so that a model has one fingerprint whether it is loaded in float32 or bfloat16
    (and, if its files are in half precision, in float16 too).

    Returns:
        The first 16 hexadecimal digits of the table's SHA-256.
    """
    table = input_embedding(text_encoder).weight.detach().to("cpu", torch.bfloat16).contiguous()
    digest = hashlib.sha256(str(tuple(table.shape)).encode())
    digest.update(table.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
