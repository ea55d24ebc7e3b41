"""Embedding files: written so that image programs load them, read whichever program wrote them.

Keys of the tensors by program, for one text encoder (Stable Diffusion 1 and 2), vectors of shape (n, width):

==================================== ============== ===========================================================
program                              key            token in prompts
==================================== ============== ===========================================================
AUTOMATIC1111, ComfyUI, InvokeAI,    ``emb_params`` file name (diffusers reads this file too, with ``token=``)
kohya
diffusers                            the token      the key
OneTrainer                           ``emp_params`` a setting of the program (it reads no other key)
==================================== ============== ===========================================================

Tokens of the output space have a form of their own, see :mod:`tokenlearn.tokens.files.outputs`.

With two text encoders (Stable Diffusion XL) all of them use the keys ``clip_l`` and ``clip_g``. A second copy under
another key cannot share a file: AUTOMATIC1111 and diffusers refuse files with two keys. Every file written here also
names its token in the metadata.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenlearn.errors import UserError, reason_of, shown
from tokenlearn.files import atomic_write
from tokenlearn.paths import resolve
from tokenlearn.tokens.bank import Space
from tokenlearn.tokens.calibration import CALIBRATION
from tokenlearn.tokens.files import a1111, diffusers, onetrainer, outputs, pickles, sdxl
from tokenlearn.tokens.files.family import Content, Family, Found

EmbeddingFormat = Literal["a1111", "comfyui", "invokeai", "kohya", "diffusers", "onetrainer"]

SAFETENSORS = ".safetensors"
MOST_VECTORS = 1024
"""Largest number of vectors of a token; no text encoder takes prompts of as many units."""

_MOST_BYTES = 2**28  # of a file: 1024 vectors of the widest text encoders take 16 MB
_MOST_KEYS = 64
_MOST_LETTERS = 100  # of a token, which file systems take as a name
_LARGEST = 65504.0  # of half precision, in which text encoders often work
_FAMILIES: dict[EmbeddingFormat, Family] = {
    "a1111": a1111,
    "comfyui": a1111,
    "invokeai": a1111,
    "kohya": a1111,
    "diffusers": diffusers,
    "onetrainer": onetrainer,
}
_READERS: tuple[Family, ...] = (
    outputs,
    onetrainer,
    sdxl,
    a1111,
    diffusers,
)  # diffusers' key can be anything, so it is last


@dataclass
class EmbeddingFile:
    """The contents of an embedding file.

    Attributes:
        token: the token to use in prompts.
        vectors: (n, width) float32 on the CPU per text encoder; CLIP-L before CLIP-G if there are two.
        metadata: text entries of the file, for instance the base model.
        path: the file.
        space: where the vectors live.
    """

    token: str
    vectors: list[Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    path: Path | None = None
    space: Space = "input"


def embedding_file_name(token: str) -> str:
    """File name for a token: ``<Wizard>`` gives ``wizard.safetensors``.

    ComfyUI cuts names at ``<`` and ``[`` and at spaces, and AUTOMATIC1111 uses the name as the token in prompts.

    Raises:
        UserError: if the token has no letter or digit to make a name of.
    """
    stem = re.sub(r"[^\w.-]+", "-", token.lower()).strip("-.")
    if not stem:
        raise UserError(f"cannot make a file name of the token '{token}'; use letters or digits in it")
    return f"{stem}{SAFETENSORS}"


def save_embedding(
    path: str | os.PathLike[str],
    token: str,
    vectors: Sequence[Tensor],
    metadata: Mapping[str, str],
    format: EmbeddingFormat = "a1111",
    scale: float = 1.0,
    space: Space = "input",
) -> Path:
    """Write an embedding file, whole or not at all.

    Args:
        path: a ``.safetensors`` file, best named by :func:`embedding_file_name`.
        token: the token as used in prompts.
        vectors: (n, width) per text encoder; CLIP-L before CLIP-G if there are two.
        metadata: text entries of the file; ``token`` and ``format`` are added.
        format: the program that will load the file; see the table at the top of this module. The first four formats
            are the same file. A token of the output space has one form only, whatever the format.
        scale: factor on the vectors, which makes the token stronger or weaker in programs without weights.
        space: where the vectors live.

    Returns:
        The path written.

    Raises:
        UserError: if the folder is not writable, the suffix is another one, or a value is not finite.
    """
    target = Path(path)
    if target.suffix != SAFETENSORS:
        raise UserError(f"cannot write the embedding '{target}': name it '{target.stem}{SAFETENSORS}'")
    if len(vectors) not in (1, 2):
        raise ValueError(f"expected vectors for 1 or 2 text encoders, found {len(vectors)}")
    # A copy: safetensors refuses views of one storage, and the bank's rows are views.
    copies = [(tensor.detach() * scale).to("cpu").float().contiguous().clone() for tensor in vectors]
    if not all(tensor.isfinite().all() for tensor in copies):
        raise UserError(
            f"the vectors of '{token}' are not finite, so '{target}' was not written; export an earlier checkpoint"
        )
    family: Family = sdxl if len(copies) > 1 else _FAMILIES[format]
    entries = {**metadata, "token": token, "format": "pt"}
    if space != "input":
        family, entries = outputs, entries | {"space": space}
    if scale != 1.0:
        entries["scale"] = str(scale)
        entries.pop(CALIBRATION, None)  # it is of the vectors as they were
    with atomic_write(target) as temporary:
        save_file(family.tensors(token, copies), temporary, metadata=entries)
    return target


def add_metadata(path: Path, entries: Mapping[str, str]) -> None:
    """Add text entries to an embedding file, or replace them, and leave its vectors as they are.

    Args:
        path: a ``.safetensors`` file.
        entries: the entries.

    Raises:
        UserError: if the file is of another kind, damaged, or cannot be written.
    """
    if path.suffix != SAFETENSORS:
        raise UserError(f"'{path}' cannot take entries; convert it by 'tokenlearn export --embedding {path}' first")
    content = _read_safetensors(path)
    with atomic_write(path) as temporary:
        save_file(dict(content.tensors), temporary, metadata={**content.metadata, **entries})


def load_embedding(path: str | os.PathLike[str], token: str | None = None) -> EmbeddingFile:
    """Read an embedding file of any of the programs above, including their older pickles.

    Supported are safetensors files and ``.pt``/``.bin`` pickles that hold ``emb_params``, ``emp_params``, ``clip_l``
    with or without ``clip_g``, one tensor under any key (diffusers: the key is the token), or AUTOMATIC1111's
    ``string_to_param`` and ``name``; pickles may also be a bare tensor. Pickles are read by ``torch.load`` with
    ``weights_only=True`` alone, which runs no code in them.

    The token is the first found of the argument, the file's metadata, its key or ``name``, and the file's name in
    angle brackets (``wizard.pt`` gives ``<wizard>``), the reverse of :func:`embedding_file_name`.

    Args:
        path: the file.
        token: token to use in prompts instead of the file's token.

    Returns:
        The token, its vectors and the file's metadata.

    Raises:
        UserError: if the file is missing, damaged, an unsafe pickle, too large, of an unknown kind, or has values that
            are not finite or beyond half precision; or if its token cannot be written.
    """
    source = Path(resolve(path)).expanduser()
    if not source.is_file():
        raise UserError(f"no embedding file '{source}'; check the path")
    if (size := source.stat().st_size) > _MOST_BYTES:
        raise UserError(f"'{source}' has {size} bytes, more than any embedding; is it a whole model?")
    try:
        return _loaded(_read(source), source, token)
    except UserError:
        raise
    except Exception as error:  # what is in a foreign file can fail in any way
        raise UserError(
            f"'{source}' holds something else than an embedding ({type(error).__name__}); is it another kind of file?"
        ) from None


def _loaded(content: Content, source: Path, token: str | None) -> EmbeddingFile:
    if not content.tensors:
        raise UserError(f"'{source}' holds no embedding vectors; is it another kind of file?")
    if not all(isinstance(key, str) for key in content.tensors) or len(content.tensors) > _MOST_KEYS:
        raise UserError(
            f"'{source}' holds {len(content.tensors)} entries that are not all named tensors of an embedding; is it "
            "another kind of file?"
        )
    found = _find(frozenset(content.tensors), source)
    name = token or content.metadata.get("token") or found.token or content.token or _token_from_name(source)
    if not name.isprintable() or len(name) > _MOST_LETTERS:
        raise UserError(
            f"'{source}' names its token {shown(name)}, of {len(name)} letters, which cannot be written; name it by "
            "{<token>: file} in model.embeddings, or pass token="
        )
    vectors = [_as_vectors(content.tensors[key], key, source) for key in found.keys]
    if outputs.VERSION_KEY in content.tensors:
        return EmbeddingFile(name, vectors, content.metadata, source, _output_space(content, source))
    if len({len(tensor) for tensor in vectors}) > 1:
        raise UserError(
            f"'{source}' has {len(vectors[0])} vectors for CLIP-L and {len(vectors[1])} for CLIP-G, expected as many "
            "of each; copy or export it again"
        )
    return EmbeddingFile(name, vectors, content.metadata, source)


def _read(source: Path) -> Content:
    """The content of a file; no tensors if it holds anything else."""
    if source.suffix == SAFETENSORS:
        return _read_safetensors(source)
    if source.suffix not in pickles.SUFFIXES:
        raise UserError(
            f"'{source}' is not an embedding file; give one that ends in {SAFETENSORS}, {', '.join(pickles.SUFFIXES)}"
        )
    stored = pickles.read_pickle(source, _MOST_BYTES)
    if isinstance(stored, Tensor):
        return Content({a1111.KEY: stored})
    if not isinstance(stored, Mapping):
        return Content({})
    return a1111.read_training(stored) if a1111.is_training(stored) else Content(dict(stored))


def _read_safetensors(source: Path) -> Content:
    try:
        with safe_open(source, framework="pt", device="cpu") as file:
            keys = list(file.keys())
            tensors = {key: file.get_tensor(key) if len(keys) <= _MOST_KEYS else None for key in keys}
            return Content(tensors, dict(file.metadata() or {}))
    except Exception as error:  # a damaged header can fail in any way
        raise UserError(
            f"'{source}' is not a whole safetensors file ({shown(reason_of(error))}); copy or export it again"
        ) from None


def _find(keys: frozenset[str], source: Path) -> Found:
    for family in _READERS:
        if (found := family.find(keys, source)) is not None:
            return found
    names = ", ".join(shown(key)[1:-1] for key in sorted(keys)[:6])
    raise UserError(
        f"'{source}' has the keys {names}; expected one tensor, or {' and '.join(sdxl.KEYS)}: give an embedding file"
    )


def _output_space(content: Content, source: Path) -> Space:
    """The space of a file whose vectors are added to outputs."""
    version, space = content.tensors[outputs.VERSION_KEY].tolist(), content.metadata.get("space")
    spaces = [name for name in get_args(Space) if name != "input"]
    if version != [outputs.VERSION] or space not in spaces:
        raise UserError(
            f"'{source}' is of version {version} and space {space}; expected version [{outputs.VERSION}] and "
            f"{' or '.join(spaces)}: update tokenlearn, or make the file anew"
        )
    return cast(Space, space)


def _token_from_name(source: Path) -> str:
    stem = "-".join(source.stem.split()).strip("<>")
    if not stem.isprintable() or not stem:
        raise UserError(
            f"{shown(source, 200)} does not name its token; name it by {{<token>: file}} in model.embeddings, or pass "
            "token="
        )
    return f"<{stem}>"


def _as_vectors(value: Any, key: str, source: Path) -> Tensor:  # noqa: ANN401 - any content of a foreign file
    """A file's tensor of shape (width,) or (n, width) as (n, width) float32."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim not in (1, 2) or not value.numel():
        shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UserError(f"'{source}' has {shape} under {shown(key)}; expected floating-point vectors (n, width)")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_nested:
        raise UserError(f"'{source}' has a sparse or empty tensor under {shown(key)}; expected numbers (n, width)")
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise UserError(
            f"'{source}' claims {value.numel()} numbers under {shown(key)} and holds fewer; ask for another file"
        )
    if value.ndim == 2 and len(value) > MOST_VECTORS:
        raise UserError(
            f"'{source}' has {len(value)} vectors under {shown(key)}, more than a prompt can hold (at most "
            f"{MOST_VECTORS}); is it a whole table?"
        )
    vectors = value.detach().float().reshape(-1, value.shape[-1]).contiguous()
    if not vectors.isfinite().all():
        raise UserError(f"'{source}' holds values that are not finite; use an earlier or freshly exported file")
    if (largest := float(vectors.abs().max())) > _LARGEST:
        raise UserError(
            f"'{source}' holds values up to {largest:.3g}, beyond half precision ({_LARGEST:g}), which text encoders "
            "turn into NaN; use an earlier or freshly exported file"
        )
    return vectors
