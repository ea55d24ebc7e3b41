"""Embedding files: written so that image tools load them, read from whichever tool wrote them.

Keys of the tensors by tool, for one text encoder (Stable Diffusion 1 and 2), vectors of shape (n, width):

==================================== ============== ===========================================================
tool                                 key            token in prompts
==================================== ============== ===========================================================
AUTOMATIC1111, ComfyUI, InvokeAI,    ``emb_params`` file name (diffusers reads this file too, with ``token=``)
kohya
diffusers                            the token      the key
OneTrainer                           ``emp_params`` its own setting (it reads no other key)
==================================== ============== ===========================================================

With two text encoders (Stable Diffusion XL) all of them use the keys ``clip_l`` and ``clip_g``; diffusers is handed
the tensors one encoder at a time. A second copy under another key cannot share a file: AUTOMATIC1111 and diffusers
refuse files with two keys. Every file written here also names its token in the metadata.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenlearn.errors import UserError
from tokenlearn.files import atomic_write
from tokenlearn.tokens.bank import TokenBank
from tokenlearn.tokens.injection import input_embedding

EmbeddingFormat = Literal["a1111", "comfyui", "invokeai", "kohya", "diffusers", "onetrainer"]

_TENSOR_KEYS = ("emb_params", "emp_params", "clip_l", "clip_g")
_PICKLE_SUFFIXES = (".pt", ".bin", ".pth", ".ckpt")


@dataclass
class EmbeddingFile:
    """What an embedding file holds.

    Attributes:
        token: the token to use in prompts.
        vectors: (n, width) float32 on the CPU per text encoder; CLIP-L before CLIP-G when there are two.
        metadata: text entries of the file, for instance the base model.
    """

    token: str
    vectors: list[Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


def embedding_file_name(token: str) -> str:
    """File name for a token: ``<Wizard>`` gives ``wizard.safetensors``.

    ComfyUI cuts names at ``<`` and ``[`` and at spaces, and AUTOMATIC1111 uses the name as the token in prompts.

    Raises:
        UserError: if the token has no letter or digit to make a name of.
    """
    stem = re.sub(r"[^\w.-]+", "-", token.lower()).strip("-.")
    if not stem:
        raise UserError(f"cannot make a file name of the token '{token}'; use letters or digits in it")
    return f"{stem}.safetensors"


def save_embedding(
    path: str | os.PathLike[str],
    token: str,
    vectors: Sequence[Tensor],
    metadata: Mapping[str, str],
    format: EmbeddingFormat = "a1111",
    scale: float = 1.0,
) -> Path:
    """Write an embedding file, whole or not at all.

    Args:
        path: a ``.safetensors`` file, best named by :func:`embedding_file_name`.
        token: the token as used in prompts.
        vectors: (n, width) per text encoder; CLIP-L before CLIP-G when there are two.
        metadata: text to keep in the file; ``token`` and ``format`` are added.
        format: the tool to write for; see the table at the top of this module. The first four write the same file.
        scale: the vectors are multiplied by it, which makes the token stronger or weaker in tools without weights.

    Returns:
        The path written.

    Raises:
        UserError: if the folder is not writable, the suffix is another one, or a value is not finite.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise UserError(f"cannot write the embedding '{target}': name it '{target.stem}.safetensors'")
    if len(vectors) not in (1, 2):
        raise ValueError(f"expected vectors for 1 or 2 text encoders, found {len(vectors)}")
    single = {"diffusers": token, "onetrainer": "emp_params"}.get(format, "emb_params")
    keys = ("clip_l", "clip_g") if len(vectors) == 2 else (single,)
    tensors = {
        # A copy: safetensors refuses views of one storage, and the bank's rows are views.
        key: (tensor.detach() * scale).to("cpu", torch.float32).contiguous().clone()
        for key, tensor in zip(keys, vectors, strict=True)
    }
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"the vectors of '{token}' are not finite; '{target}' was not written")
    entries = {**metadata, "token": token, "format": "pt"}
    if scale != 1.0:
        entries["scale"] = str(scale)
    with atomic_write(target) as temporary:
        save_file(tensors, temporary, metadata=entries)
    return target


def load_embedding(path: str | os.PathLike[str], token: str | None = None) -> EmbeddingFile:
    """Read an embedding file of any of the tools above, including their older pickles.

    Understood are safetensors files and ``.pt``/``.bin`` pickles that hold ``emb_params``, ``emp_params``, ``clip_l``
    with or without ``clip_g``, one tensor under any key (diffusers: the key is the token), or AUTOMATIC1111's
    ``string_to_param`` and ``name``; pickles may also be a bare tensor. Pickles are read by ``torch.load`` with
    ``weights_only=True`` alone, which runs no code of theirs.

    Where the token comes from, first found: the argument, the file's metadata, its key or ``name``, and last the
    file's name in angle brackets (``wizard.pt`` gives ``<wizard>``), the reverse of :func:`embedding_file_name`.

    Args:
        path: the file.
        token: token to use in prompts instead of the file's own.

    Returns:
        The token, its vectors and the file's metadata.

    Raises:
        UserError: if the file is missing, damaged, an unsafe pickle, of an unknown kind, or has non-finite values.
    """
    source = Path(path)
    if not source.is_file():
        raise UserError(f"no embedding file '{source}'; check the path")
    metadata: dict[str, str] = {}
    content: object
    if source.suffix == ".safetensors":
        content, metadata = _read_safetensors(source)
    elif source.suffix in _PICKLE_SUFFIXES:
        content = _read_pickle(source)
    else:
        raise UserError(f"'{source}' is not an embedding file; expected .safetensors, {', '.join(_PICKLE_SUFFIXES)}")
    stored_token: str | None = None
    if isinstance(content, Mapping) and "string_to_param" in content:
        kept = ("name", "step", "sd_checkpoint", "sd_checkpoint_name")
        metadata = {key: str(content[key]) for key in kept if content.get(key) is not None}
        stored_token = metadata.get("name")
        params = content["string_to_param"]
        params = dict(params.items()) if isinstance(params, Mapping | nn.ParameterDict) else {}
        # The key is "*" in all but a few old files; the tools that read those take the first.
        content = {"emb_params": params.get("*", next(iter(params.values())))} if params else {}
    elif isinstance(content, Tensor):
        content = {"emb_params": content}
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"'{source}' holds no embedding vectors; is it another kind of file?")

    found = [str(key) for key in content]
    outputs = [key for key in found if key.endswith("_out")]
    if outputs:
        raise UserError(
            f"'{source}' has vectors for the text encoder's output ({', '.join(outputs)}), which no prompt can hold; "
            "train and export it without output embeddings"
        )
    if set(found) == {"clip_l", "clip_g"}:
        keys = ["clip_l", "clip_g"]
    elif len(found) == 1:
        keys = found
        if keys[0] not in _TENSOR_KEYS:
            stored_token = keys[0]
    else:
        raise UserError(
            f"'{source}' has the keys {', '.join(sorted(found)[:6])}; expected one tensor, or clip_l and clip_g"
        )
    name = token or metadata.get("token") or stored_token or _token_from_name(source)
    vectors = [_as_vectors(content[key], key, source) for key in keys]
    if len({len(tensor) for tensor in vectors}) > 1:
        raise UserError(f"'{source}' has {len(vectors[0])} vectors for CLIP-L but {len(vectors[1])} for CLIP-G")
    return EmbeddingFile(name, vectors, metadata)


@torch.no_grad()
def load_bank(
    paths: Sequence[str], embedding_widths: Sequence[int], vocabulary: str | None = None
) -> tuple[TokenBank, list[EmbeddingFile]]:
    """A bank of the tokens of embedding files.

    Args:
        paths: at least one file of any form that :func:`load_embedding` reads.
        embedding_widths: width of the input embedding of each text encoder of the backbone.
        vocabulary: the backbone's :func:`vocabulary_hash`, to refuse files that say that they are for another one.

    Returns:
        The bank, and what the files hold.

    Raises:
        UserError: if a file cannot be read, has vectors of another width, is for another model of the same width, or
            names a token that another one does.
    """
    files = [load_embedding(path) for path in paths]
    counts: dict[str, int] = {}
    for path, file in zip(paths, files, strict=True):
        if file.token in counts:
            raise UserError(f"'{path}' names the token '{file.token}', as another embedding file does; rename one")
        counts[file.token] = len(file.vectors[0])
    bank = TokenBank(counts, embedding_widths)
    for path, file in zip(paths, files, strict=True):
        bank.set(file.token, file.vectors)
        if vocabulary is not None and file.metadata.get("vocabulary_hash", vocabulary) != vocabulary:
            raise UserError(
                f"'{path}' was learned on '{file.metadata.get('base_model', 'another model')}', whose text encoder "
                "differs from this backbone's; set model.backbone to that model, or learn the token anew"
            )
    return bank, files


def vocabulary_hash(text_encoder: nn.Module) -> str:
    """Short fingerprint of the table that an embedding was trained beside.

    The table is compared in bfloat16, so that a model has one fingerprint whether it is loaded in float32 or bfloat16
    (and, when its files are in half precision, in float16 too). Placeholders of an injection do not count.

    Returns:
        The first 16 hexadecimal digits of the table's SHA-256.
    """
    table = input_embedding(text_encoder).weight.detach().to("cpu", torch.bfloat16).contiguous()
    digest = hashlib.sha256(str(tuple(table.shape)).encode())
    digest.update(table.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _read_safetensors(source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(source, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"'{source}' is not a whole safetensors file ({reason}); copy or export it again") from None


def _read_pickle(source: Path) -> object:
    try:
        # Early embeddings keep their tensor in a ParameterDict, a class that only holds tensors.
        with torch.serialization.safe_globals([nn.ParameterDict]):
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        if "GLOBAL" in str(error):
            raise UserError(
                f"'{source}' is a pickle with more than tensors in it, which could run code and was not loaded; "
                "ask for a .safetensors file"
            ) from None
        raise UserError(f"'{source}' is damaged or no PyTorch file ({type(error).__name__}); copy it again") from None


def _token_from_name(source: Path) -> str:
    stem = "-".join(source.stem.split()).strip("<>")
    if not stem.isprintable() or not stem:
        raise UserError(f"'{source}' does not name its token; pass token=")
    return f"<{stem}>"


def _as_vectors(value: Any, key: str, source: Path) -> Tensor:  # noqa: ANN401 - whatever a foreign file holds
    """A file's tensor of shape (width,) or (n, width) as (n, width) float32."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim not in (1, 2) or not value.numel():
        shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UserError(f"'{source}' has {shape} under '{key}'; expected floating-point vectors (n, width)")
    vectors = value.detach().float().reshape(-1, value.shape[-1]).contiguous()
    if not vectors.isfinite().all():
        raise UserError(f"'{source}' holds values that are not finite; use an earlier or freshly exported file")
    return vectors
