"""Embedding files: written so that image programs load them, read whichever program wrote them.

Keys of the arrays by program, for one text encoder of the CLIP kind (Stable Diffusion 1 and 2), vectors of shape
(n, width):

==================================== ============== ===========================================================
program                              key            token in prompts
==================================== ============== ===========================================================
AUTOMATIC1111, ComfyUI, InvokeAI,    ``emb_params`` file name (diffusers reads this file too, with ``token=``)
kohya
diffusers                            the token      the key
OneTrainer                           ``emp_params`` a setting of the program (it reads no other key)
==================================== ============== ===========================================================

Tokens of the output space have a form of their own, see :mod:`tokenlearn.tokens.files.outputs`.

Other text encoders, and models with several, have a key for each encoder in all programs, see
:mod:`tokenlearn.tokens.files.encoders`. A second copy under another key cannot share a file with ``emb_params``:
AUTOMATIC1111 and diffusers refuse files with two keys. Every file written here also names its token in the metadata.

Nothing here imports torch but for pickles and where vectors are asked for as tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np

from tokenlearn.errors import UserError, shown
from tokenlearn.files import atomic_write
from tokenlearn.paths import resolve
from tokenlearn.tokens.calibration import CALIBRATION
from tokenlearn.tokens.files import a1111, bundles, diffusers, encoder_keys, images, onetrainer, outputs
from tokenlearn.tokens.files.encoders import CLIP, ENCODERS, encoder_names
from tokenlearn.tokens.files.family import Content, FileSpace, Found, Reader, Writer, wrapped
from tokenlearn.tokens.files.names import SAFETENSORS
from tokenlearn.tokens.files.safetensors_files import Array, read_arrays, write_arrays
from tokenlearn.tokens.spaces import Space

if TYPE_CHECKING:
    from torch import Tensor

EmbeddingFormat = Literal["a1111", "comfyui", "invokeai", "kohya", "diffusers", "onetrainer"]

SUFFIXES = (SAFETENSORS, ".pt", ".bin", ".pti", ".pth", ".ckpt", *images.SUFFIXES)
"""Of files that may hold embeddings."""

MOST_VECTORS = 1024
"""Largest number of vectors of a token; no text encoder takes prompts of as many units."""

ENCODERS_ENTRY = "encoders"
"""Entry of an embedding file's metadata that names its text encoders, separated by commas."""

_MOST_BYTES = 2**28  # of a file: 1024 vectors of the widest text encoders take 16 MB
_MOST_KEYS = 64
_MOST_LETTERS = 100  # of a token, which file systems take as a name
_LARGEST = 65504.0  # of half precision, in which text encoders often work
_WRITERS: dict[EmbeddingFormat, Writer] = {
    "a1111": a1111.arrays,
    "comfyui": a1111.arrays,
    "invokeai": a1111.arrays,
    "kohya": a1111.arrays,
    "diffusers": diffusers.arrays,
    "onetrainer": onetrainer.arrays,
}
_READERS: tuple[Reader, ...] = (
    outputs.find,
    bundles.find,
    onetrainer.find,
    encoder_keys.find,
    a1111.find,
    diffusers.find,  # its key can be anything, so it is last
)


@dataclass
class EmbeddingFile:
    """A token of an embedding file.

    Attributes:
        token: the token to use in prompts.
        arrays: (n, width) float32 per text encoder.
        metadata: text entries of the file, for instance the base model.
        path: the file.
        space: where the vectors live.
        encoders: names of the text encoders, see :data:`tokenlearn.tokens.files.encoders.ENCODERS`.
        ignored: keys of the file that no task here has a use for.
        stored: all keys of the file.
    """

    token: str
    arrays: list[Array]
    metadata: dict[str, str] = field(default_factory=dict)
    path: Path | None = None
    space: FileSpace = "input"
    encoders: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    stored: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.encoders = self.encoders or named_encoders(self.metadata, [part.shape[1] for part in self.arrays])

    @property
    def vectors(self) -> list[Tensor]:
        """(n, width) float32 on the CPU per text encoder; CLIP-L before CLIP-G if there are both."""
        import torch

        return [torch.from_numpy(part.copy()) for part in self.arrays]


def named_encoders(metadata: Mapping[str, str], widths: Sequence[int]) -> tuple[str, ...]:
    """Text encoders that metadata name, else those of the number and widths."""
    named = tuple(filter(None, metadata.get(ENCODERS_ENTRY, "").split(",")))
    return named if len(named) == len(widths) else encoder_names(widths)


def has_known_widths(file: EmbeddingFile) -> bool:
    """Whether the vectors have the widths of the text encoders in use, which those of tiny models have not."""
    return all(ENCODERS[name].width == part.shape[1] for name, part in zip(file.encoders, file.arrays, strict=True))


def save_embedding(
    path: str | os.PathLike[str],
    token: str,
    vectors: Sequence[Tensor | Array],
    metadata: Mapping[str, str],
    format: EmbeddingFormat = "a1111",
    scale: float = 1.0,
    space: FileSpace = "input",
) -> Path:
    """Write an embedding file, whole or not at all. The same content gives the same bytes.

    Args:
        path: a ``.safetensors`` file, best named by :func:`tokenlearn.tokens.files.embedding_file_name`.
        token: the token as used in prompts.
        vectors: (n, width) per text encoder; CLIP-L before CLIP-G if there are both.
        metadata: text entries of the file; ``token`` and ``format`` are added. ``encoders`` names the text encoders
            of models that their number and widths do not tell.
        format: the program that will load the file; see the table at the top of this module. The first four formats
            are the same file. A token of the output space has one form only, whatever the format.
        scale: factor on the vectors, which makes the token stronger or weaker in programs without weights.
        space: where the vectors live.

    Returns:
        The path written.

    Raises:
        UserError: if the folder is not writable, the suffix is another one, a value is not finite, or the file is
            there and holds another token.
    """
    target = Path(path)
    if target.suffix != SAFETENSORS:
        raise UserError(f"cannot write the embedding '{target}': name it '{target.stem}{SAFETENSORS}'")
    scaled = [_float32(part) * np.float32(scale) for part in vectors]
    if not all(np.isfinite(part).all() for part in scaled):
        raise UserError(
            f"the vectors of '{token}' are not finite, so '{target}' was not written; export an earlier checkpoint"
        )
    refuse_other_token(target, token)
    entries = {**metadata, "token": token, "format": "pt"}
    if scale != 1.0:
        entries["scale"] = str(scale * float(metadata.get("scale", 1.0)))
        entries.pop(CALIBRATION, None)  # it is of the vectors as they were
    if space not in ("input", "output_place"):
        entries["space"] = space
    encoders = named_encoders(metadata, [part.shape[1] for part in scaled])
    with atomic_write(target) as temporary:
        write_arrays(temporary, _stored(token, scaled, encoders, format, space), entries)
    return target


def _stored(
    token: str, vectors: Sequence[Array], encoders: Sequence[str], format: EmbeddingFormat, space: FileSpace
) -> dict[str, Array]:
    """Arrays of a file by their keys."""
    if space not in ("input", "output_place"):
        return outputs.arrays(token, vectors)
    one_clip = len(vectors) == 1 and encoders[0] in CLIP
    stored = _WRITERS[format](token, vectors) if one_clip else encoder_keys.arrays(encoders, vectors)
    return {f"{key}{onetrainer.OUT}": part for key, part in stored.items()} if space == "output_place" else stored


def stored_keys(token: str, encoders: Sequence[str], format: EmbeddingFormat, space: FileSpace) -> frozenset[str]:
    """Keys of a file as :func:`save_embedding` writes it."""
    return frozenset(_stored(token, [np.zeros((1, 1))] * len(encoders), encoders, format, space))


def refuse_other_token(target: Path, token: str) -> None:
    """Refuse to write a token over the file of another one, or over a file that cannot be read.

    Raises:
        UserError: naming the token of the file that is there.
    """
    if not target.is_file():
        return
    try:
        there = ", ".join(file.token for file in read_tokens(target))
    except UserError:
        there = "something else"
    if there != token:
        raise UserError(
            f"'{target}' is there and holds {there}, not {token}; choose another folder, or another name by --name"
        )


def add_metadata(path: Path, entries: Mapping[str, str]) -> None:
    """Add text entries to an embedding file, or replace them, and leave its vectors as they are.

    Args:
        path: a ``.safetensors`` file.
        entries: the entries.

    Raises:
        UserError: if the file is of another kind, damaged, or cannot be written.
    """
    if path.suffix != SAFETENSORS:
        raise UserError(f"'{path}' cannot take entries; convert it by 'tokenlearn convert {path}' first")
    arrays, metadata = read_arrays(path, list)
    with atomic_write(path) as temporary:
        write_arrays(temporary, arrays, {**metadata, **entries})


def load_embedding(path: str | os.PathLike[str], token: str | None = None) -> EmbeddingFile:
    """Read an embedding file with one token, see :func:`read_tokens`.

    Args:
        path: the file.
        token: token to use in prompts instead of the file's token; angle brackets are added if it has none.

    Returns:
        The token, its vectors and the file's metadata.

    Raises:
        UserError: if the file holds several tokens, or see :func:`read_tokens`.
    """
    tokens = read_tokens(path)
    if len(tokens) > 1:
        names = ", ".join(shown(file.token)[1:-1] for file in tokens[:6])
        raise UserError(
            f"'{path}' holds {len(tokens)} tokens ({names}); write a file for each by 'tokenlearn convert {path}'"
        )
    (file,) = tokens
    if token is not None:
        file.token = wrapped(token)
    check_token(file)
    return file


def read_tokens(path: str | os.PathLike[str]) -> list[EmbeddingFile]:
    """Read all tokens of an embedding file of any program, including older forms.

    Supported are safetensors files, pickles (``.pt``, ``.bin``) and AUTOMATIC1111's PNG and WEBP images. They hold
    ``emb_params``, ``emp_params``, a key for each text encoder (``clip_l``, ``clip_g``, ``t5xxl`` or ``t5``, ...;
    ``text_encoders_0``, ``text_encoders_1``), one tensor under any key, several under ``<tokens>``, AUTOMATIC1111's
    ``string_to_param``, or ``bundle_emb`` entries of a LoRA file; pickles may also be a bare tensor. Pickles are read
    by ``torch.load`` with ``weights_only=True`` alone, which runs no code in them. The two files that diffusers'
    trainer writes for Stable Diffusion XL are one token, given either.

    A file that tokenlearn wrote names its token. So does a key in angle brackets, one of a bundle, and the key in a
    file of diffusers' trainer. Any other token is named after the file, as most programs do: ``wizard.pt`` gives
    ``<wizard>``, whatever name is inside.

    Args:
        path: the file.

    Returns:
        The tokens, each with its vectors and the file's metadata.

    Raises:
        UserError: if the file is missing, damaged, an unsafe pickle, too large, of an unknown kind, or has values that
            are not finite or beyond half precision; or if its token cannot be written.
    """
    source = Path(resolve(path)).expanduser()
    if not source.is_file():
        raise UserError(f"no embedding file '{source}'; check the path")
    pair = diffusers.pair(source)
    if pair is None:
        return _tokens_of(source)
    first, second = (_tokens_of(part) for part in pair)
    by_token = {file.token: file for file in second}
    for file in first:
        if (other := by_token.get(file.token)) is None:
            raise UserError(f"'{pair[0]}' has the token {file.token}, which '{pair[1]}' lacks; copy both again")
        _check_counts([*file.arrays, *other.arrays], ("clip_l", "clip_g"), pair[0])
        file.arrays, file.encoders = [*file.arrays, *other.arrays], ("clip_l", "clip_g")
    return first


def _tokens_of(source: Path) -> list[EmbeddingFile]:
    try:
        content = _read(source)
        return [_loaded(found, content, source) for found in _find(content, source)]
    except UserError:
        raise
    except Exception as error:  # what is in a foreign file can fail in any way
        raise UserError(
            f"'{source}' holds something else than an embedding ({type(error).__name__}); is it another kind of file?"
        ) from None


def _loaded(found: Found, content: Content, source: Path) -> EmbeddingFile:
    token = content.metadata.get("token") or found.token or wrapped(source.stem)
    arrays = [_as_vectors(content.arrays[key], key, source) for key in found.keys]
    file = EmbeddingFile(
        token,
        arrays,
        content.metadata,
        source,
        found.space,
        found.encoders or (),
        found.ignored,
        frozenset(content.arrays),
    )
    _check_counts(arrays, file.encoders, source)
    if outputs.VERSION_KEY in content.arrays:
        file.space = _output_space(content, source)
    return file


def _check_counts(arrays: Sequence[Array], encoders: Sequence[str], source: Path) -> None:
    if len({len(part) for part in arrays}) > 1:
        counts = " and ".join(f"{len(part)} for {name}" for part, name in zip(arrays, encoders, strict=True))
        raise UserError(f"'{source}' has {counts} vectors, expected as many of each; copy or export it again")


def check_token(file: EmbeddingFile) -> None:
    """Refuse a token that no prompt can hold.

    Raises:
        UserError: if it has white space or signs that cannot be seen, or is too long.
    """
    token, spaces = file.token, any(letter.isspace() for letter in file.token)
    if token == "<>" or not token.isprintable() or len(token) > _MOST_LETTERS or spaces:
        raise UserError(
            f"'{file.path}' names its token {shown(token)}, of {len(token)} letters, which is not one word; name it "
            "by {<token>: file} in model.embeddings, or pass token="
        )


def _read(source: Path) -> Content:
    """The content of a file; no arrays if it holds anything else."""
    suffix = source.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"'{source}' is not an embedding file; give one that ends in {', '.join(SUFFIXES)}")
    if suffix in (SAFETENSORS, ".pti"):
        return Content(*read_arrays(source, lambda keys: _wanted(keys, source)))
    if (size := source.stat().st_size) > _MOST_BYTES:
        raise UserError(f"'{source}' has {size} bytes, more than any embedding; is it a whole model?")
    if suffix in images.SUFFIXES:
        return images.read_image(source, _MOST_BYTES)
    return _read_pickle(source)


def _wanted(keys: list[str], source: Path) -> Iterable[str]:
    """The keys to read of a file: those of bundled embeddings, of which a LoRA file has many others; else all."""
    if bundled := [key for key in keys if key.startswith(bundles.PREFIX)]:
        return bundled
    if (size := source.stat().st_size) > _MOST_BYTES:
        raise UserError(f"'{source}' has {size} bytes, more than any embedding; is it a whole model?")
    return keys if len(keys) <= _MOST_KEYS else []


def _read_pickle(source: Path) -> Content:
    from tokenlearn.tokens.files import pickles  # imports torch

    stored = pickles.read_pickle(source, _MOST_BYTES)
    bare = pickles.as_array(stored, a1111.KEY, source)
    if bare is not None:
        return Content({a1111.KEY: bare})
    whole = pickles.as_mapping(stored) or {}
    terms = pickles.as_mapping(whole.get("string_to_param")) if a1111.is_training(whole) else None
    content = a1111.read_training(whole, terms) if a1111.is_training(whole) else Content(whole)
    if not all(isinstance(key, str) for key in content.arrays) or len(content.arrays) > _MOST_KEYS:
        return content
    arrays = {}
    for key, value in content.arrays.items():
        array = pickles.as_array(value, key, source)
        arrays[key] = value if array is None else array
    return content._replace(arrays=arrays)


def _find(content: Content, source: Path) -> list[Found]:
    if not content.arrays:
        raise UserError(f"'{source}' holds no embedding vectors; is it another kind of file?")
    bundled = any(isinstance(key, str) and key.startswith(bundles.PREFIX) for key in content.arrays)
    if not all(isinstance(key, str) for key in content.arrays) or (len(content.arrays) > _MOST_KEYS and not bundled):
        raise UserError(
            f"'{source}' holds {len(content.arrays)} entries that are not all named tensors of an embedding; is it "
            "another kind of file?"
        )
    keys = frozenset(content.arrays)
    for find in _READERS:
        if found := find(keys, source):
            return found
    names = ", ".join(shown(key)[1:-1] for key in sorted(keys)[:6])
    raise UserError(
        f"'{source}' has the keys {names}; expected one tensor, a key for each text encoder such as clip_l and "
        "clip_g, or <tokens>: give an embedding file"
    )


def _output_space(content: Content, source: Path) -> Space:
    """The space of a file whose vectors are added to outputs."""
    version, space = content.arrays[outputs.VERSION_KEY].tolist(), content.metadata.get("space")
    spaces = [name for name in get_args(Space) if name != "input"]
    if version != [outputs.VERSION] or space not in spaces:
        raise UserError(
            f"'{source}' is of version {version} and space {space}; expected version [{outputs.VERSION}] and "
            f"{' or '.join(spaces)}: update tokenlearn, or make the file anew"
        )
    return cast(Space, space)


def _as_vectors(value: Any, key: str, source: Path) -> Array:  # noqa: ANN401 - any content of a foreign file
    """A file's array of shape (width,) or (n, width) as (n, width) float32."""
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.ndim not in (1, 2) or not value.size:
        shape = f"shape {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise UserError(f"'{source}' has {shape} under {shown(key)}; expected floating-point vectors (n, width)")
    if value.ndim == 2 and len(value) > MOST_VECTORS:
        raise UserError(
            f"'{source}' has {len(value)} vectors under {shown(key)}, more than a prompt can hold (at most "
            f"{MOST_VECTORS}); is it a whole table?"
        )
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(value.reshape(-1, value.shape[-1]), dtype=np.float32)
    if not np.isfinite(vectors).all():
        raise UserError(f"'{source}' holds values that are not finite; use an earlier or freshly exported file")
    if (largest := float(np.abs(vectors).max())) > _LARGEST:
        raise UserError(
            f"'{source}' holds values up to {largest:.3g}, beyond half precision ({_LARGEST:g}), which text encoders "
            "turn into NaN; use an earlier or freshly exported file"
        )
    return vectors


def _float32(vectors: Tensor | Array) -> Array:
    """Vectors as a float32 array of their own."""
    if isinstance(vectors, np.ndarray):
        return vectors.astype(np.float32)
    array: Array = vectors.detach().to("cpu").float().numpy().copy()
    return array
