"""Files of tokens for other programs: their names, what their metadata say, and what stands beside them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tokenlearn.errors import UserError, check_file_name
from tokenlearn.files import atomic_write
from tokenlearn.paths import bundled_root
from tokenlearn.tokens.files.base import (
    ENCODERS_ENTRY,
    EmbeddingFile,
    EmbeddingFormat,
    has_known_widths,
    refuse_other_token,
    save_embedding,
    stored_keys,
)
from tokenlearn.tokens.files.names import SAFETENSORS, checked_stem, embedding_file_name, name_warnings
from tokenlearn.tokens.files.programs import how_to_use, what_to_type

_ARCHITECTURES = {
    ("clip_l",): "stable-diffusion-v1",
    ("clip_h",): "stable-diffusion-v2",
    ("clip_l", "clip_g"): "stable-diffusion-xl-v1-base",
    ("clip_l", "clip_g", "t5xxl"): "stable-diffusion-3",
    ("clip_l", "t5xxl"): "flux-1-dev",
}
_CARD_VERSIONS = {("clip_l",): "SD1", ("clip_h",): "SD2", ("clip_l", "clip_g"): "SDXL"}
_SHOWN_AT_MOST = 3  # tokens whose use is printed in full
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_tokens(
    tokens: Sequence[EmbeddingFile],
    folder: Path,
    format: EmbeddingFormat = "a1111",
    scale: float = 1.0,
    name: str | None = None,
) -> list[Path]:
    """Write a file for each token, with what programs show of it: ``modelspec`` entries, and a ``.json`` beside it.

    Args:
        tokens: the tokens.
        folder: folder of the files; it is made if it does not exist.
        format: the program that will load them. AUTOMATIC1111's form has the ``.json``.
        scale: factor on the vectors.
        name: name of the file of a single token; by default that of
            :func:`tokenlearn.tokens.files.embedding_file_name`.

    Returns:
        Paths of the files.

    Raises:
        UserError: if two tokens would be written to the same file, a file of another token is there, a name cannot be
            used, or a file cannot be written.
    """
    if name is not None and len(tokens) != 1:
        raise UserError(f"--name '{name}' is for one token, and these are {len(tokens)}; choose one by --tokens")
    names = [f"{checked_stem(name)}{SAFETENSORS}"] if name is not None else file_names(file.token for file in tokens)
    targets = [folder / file_name for file_name in names]
    for file, target in zip(tokens, targets, strict=True):  # before any is written
        refuse_other_token(target, file.token)
    written = []
    for file, target in zip(tokens, targets, strict=True):
        about = _described(file, target, format)
        save_embedding(target, file.token, file.arrays, about, format, scale, file.space)
        if format == "a1111" and file.space == "input":
            version = _CARD_VERSIONS.get(file.encoders) if has_known_widths(file) else None
            _write_card(target.with_suffix(".json"), about, version)
        written.append(target)
    return written


def file_names(tokens: Iterable[str]) -> list[str]:
    """The file name of each token's embedding file.

    Raises:
        UserError: if two tokens give the same file name, so that one would replace the other, or one gives none, or
            one that is too long.
    """
    named: dict[str, str] = {}
    for token in tokens:
        name = embedding_file_name(token)
        check_file_name(name, "the token of")
        if name in named:
            raise UserError(f"the tokens '{named[name]}' and '{token}' both give the file '{name}'; rename one")
        named[name] = token
    return list(named)


def print_written(tokens: Sequence[EmbeddingFile], paths: Sequence[Path], format: EmbeddingFormat) -> None:
    """Print paths, and on the error stream, out of what scripts read, the lines of :func:`usage`."""
    for path in paths:
        print(path)
    for line in usage(tokens, paths, format):
        print(line, file=sys.stderr)


def usage(tokens: Sequence[EmbeddingFile], paths: Sequence[Path], format: EmbeddingFormat) -> list[str]:
    """Lines on the use of written files: what to type in each program, for a few of them, and warnings of names."""
    lines = [warning for path in paths for warning in name_warnings(path.stem)]
    for file, path in list(zip(tokens, paths, strict=True))[:_SHOWN_AT_MOST]:
        lines.append(f"{path.name}: what to type")
        lines += [f"  {line}" for line in how_to_use(as_written(file, path, format))]
    if len(paths) > _SHOWN_AT_MOST:
        lines.append(f"... and so for the other {len(paths) - _SHOWN_AT_MOST}; see 'tokenlearn inspect {paths[-1]}'")
    return lines


def as_written(file: EmbeddingFile, path: Path, format: EmbeddingFormat) -> EmbeddingFile:
    """A token as it is read from its file of a format."""
    keys = stored_keys(file.token, file.encoders, format, file.space)
    return replace(file, path=path, stored=keys)


def portable_model_name(pretrained: str) -> str:
    """Name of a model that says something on another machine: its hub id, or the name of its file or folder."""
    path = Path(pretrained).expanduser()
    if not path.exists():
        return path.name if os.path.isabs(path) else pretrained
    absolute, bundled = path.resolve(), bundled_root().resolve()
    if absolute.is_relative_to(bundled / "checkpoints"):
        return absolute.relative_to(bundled).as_posix()
    try:
        origin = json.loads((path / "model_index.json").read_text()).get("_name_or_path", "")
    except (OSError, ValueError, AttributeError):
        return absolute.name
    return origin if isinstance(origin, str) and _HUB_ID.fullmatch(origin) else absolute.name


def _described(file: EmbeddingFile, target: Path, format: EmbeddingFormat) -> dict[str, str]:
    """Metadata of a file: those of the token, its use in each program, and ``modelspec`` entries.

    The latter are the field's standard (https://github.com/Stability-AI/ModelSpec) without a date, which would give
    every export other bytes.
    """
    entries = {**file.metadata, ENCODERS_ENTRY: ",".join(file.encoders)}
    if "base_model" in entries:
        entries["base_model"] = portable_model_name(entries["base_model"])
    typed = what_to_type(as_written(replace(file, metadata=entries), target, format))
    entries["usage"] = json.dumps(typed, ensure_ascii=False)
    if file.space == "input":
        entries["modelspec.sai_model_spec"] = "1.0.1"
        entries["modelspec.implementation"] = "diffusers"
        entries["modelspec.title"] = entries["modelspec.trigger_phrase"] = target.stem
        entries["modelspec.usage_hint"] = "; ".join(f"{program}: {text}" for program, text in typed.items())
        entries["modelspec.description"] = _description(entries)
        if has_known_widths(file) and (architecture := _ARCHITECTURES.get(file.encoders)) is not None:
            entries["modelspec.architecture"] = f"{architecture}/textual-inversion"
    return entries


def _description(entries: Mapping[str, str]) -> str:
    """A sentence on a token's origin and quality."""
    parts = [f"Token of '{entries['class']}'" if "class" in entries else "Token"]
    if "method" in entries:
        parts.append(f"learned by {entries['method'].replace('_', ' ')}")
    if "base_model" in entries:
        known = f" (vocabulary {entries['vocabulary_hash']})" if "vocabulary_hash" in entries else ""
        parts.append(f"on {entries['base_model']}{known}")
    judged = sorted(key for key in entries if key.startswith("judged_"))
    parts += [f"with {key.replace('_', ' ')} {entries[key]} by {entries.get('judge', 'the judge')}" for key in judged]
    return f"{' '.join(parts)}."


def _write_card(path: Path, entries: Mapping[str, str], version: str | None) -> None:
    """What AUTOMATIC1111, Forge and SD.Next show on the card of an embedding."""
    card = {
        "description": entries["modelspec.description"],
        "notes": entries["modelspec.usage_hint"],
        "activation text": json.loads(entries["usage"]).get("AUTOMATIC1111, Forge, SD.Next", ""),
    }
    if version is not None:
        card["sd version"] = version
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
