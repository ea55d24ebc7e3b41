"""Learned tokens read from embedding files, and written as embedding files."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenlearn.errors import UserError, shown
from tokenlearn.paths import resolve
from tokenlearn.tokens.bank import TokenBank
from tokenlearn.tokens.calibration import CALIBRATION, Calibration
from tokenlearn.tokens.files import (
    EmbeddingFile,
    EmbeddingFormat,
    embedding_file_name,
    load_embedding,
    save_embedding,
)

Embeddings = str | list[str] | dict[str, str]
"""Embedding files in settings: a folder or a file; folders and files; or token to file, which renames the token."""

_FOLDER_SUFFIXES = (".safetensors", ".pt", ".bin")  # what image programs take for embeddings in their folders


def load_embeddings(embeddings: Embeddings) -> list[EmbeddingFile]:
    """Read embedding files.

    Args:
        embeddings: a folder or a file; any number of folders and files; or token to file, which renames the token. In
            a folder, the embedding files directly in it count, in the order of their names.

    Raises:
        UserError: if a file cannot be read, a folder has none, or two files name the same token.
    """
    if isinstance(embeddings, Mapping):
        files = [load_embedding(path, token) for token, path in embeddings.items()]
    else:
        names = [embeddings] if isinstance(embeddings, str) else embeddings
        files = [load_embedding(path) for name in names for path in _paths(name)]
    seen: dict[str, Path | None] = {}
    for file in files:
        if any(letter.isspace() for letter in file.token):
            raise UserError(
                f"'{file.path}' names its token '{file.token}', which is not one word; name it by {{<token>: file}} "
                "in model.embeddings"
            )
        if file.token in seen:
            raise UserError(
                f"'{file.path}' names the token '{file.token}', as '{seen[file.token]}' does; leave one out, or "
                "rename them by {<token>: file}"
            )
        seen[file.token] = file.path
    return files


def load_bank(
    embeddings: Embeddings, embedding_widths: Sequence[int], vocabulary: str | None = None
) -> tuple[TokenBank, list[EmbeddingFile]]:
    """A bank of the tokens of embedding files.

    Args:
        embeddings: at least one file, see :func:`load_embeddings`.
        embedding_widths: width of the input embedding of each text encoder of the backbone.
        vocabulary: the backbone's :func:`tokenlearn.tokens.vocabulary_hash`, to refuse files that were made for
            another one.

    Returns:
        The bank, and the contents of the files.

    Raises:
        UserError: if files cannot be read (see :func:`load_embeddings`), have vectors of another width, or are for
            another model of the same width.
    """
    files = load_embeddings(embeddings)
    bank = TokenBank(
        {file.token: len(file.vectors[0]) for file in files},
        embedding_widths,
        {file.token: file.space for file in files},
    )
    for file in files:
        bank.set(file.token, file.vectors)
        if CALIBRATION in file.metadata:
            bank.calibrations[file.token] = Calibration.from_json(file.metadata[CALIBRATION], file.path)
        if vocabulary is not None and file.metadata.get("vocabulary_hash", vocabulary) != vocabulary:
            raise UserError(
                f"'{file.path}' was learned on {shown(file.metadata.get('base_model', 'another model'))}, whose text "
                "encoder differs from this backbone's; set model.backbone to that model, or learn the token anew"
            )
    return bank, files


def tokens_by_setting(embeddings: Embeddings, files: Sequence[EmbeddingFile]) -> list[tuple[str, ...]]:
    """Tokens of each file or folder that a setting names: those of a folder together.

    Args:
        embeddings: the setting.
        files: what :func:`load_embeddings` read for it.
    """
    names = [embeddings] if isinstance(embeddings, str) else list(embeddings)
    folders = [] if isinstance(embeddings, Mapping) else [Path(resolve(name)).expanduser() for name in names]
    groups: dict[str, tuple[str, ...]] = {}
    for file in files:
        folder = None if file.path is None else file.path.parent
        group = str(folder) if folder in folders else file.token
        groups[group] = (*groups.get(group, ()), file.token)
    return list(groups.values())


@dataclass
class LearnedTokens:
    """Tokens and what is known of them: the result of a training, to be used by a pipeline or saved.

    Attributes:
        bank: vectors of the tokens.
        metadata: placeholder to text entries of its embedding file, such as the base model.
    """

    bank: TokenBank
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def placeholders(self) -> tuple[str, ...]:
        """The tokens as they are written in prompts."""
        return self.bank.placeholders

    def __or__(self, other: LearnedTokens) -> LearnedTokens:
        """The tokens of both.

        Raises:
            UserError: if both have a token of one name, or are for models of different widths.
        """
        first, second = self.bank, other.bank
        if twice := sorted(first.num_vectors.keys() & second.num_vectors.keys()):
            raise UserError(f"both have a token '{twice[0]}'; rename one of them")
        if first.embedding_widths != second.embedding_widths:
            raise UserError(
                f"tokens of widths {first.embedding_widths} and {second.embedding_widths} are for different models; "
                "put tokens of one model together"
            )
        bank = TokenBank(first.num_vectors | second.num_vectors, first.embedding_widths, first.spaces | second.spaces)
        for source in (first, second):
            for token in source.placeholders:
                bank.set(token, [part.detach() for part in source.get(token)])
        bank.calibrations = first.calibrations | second.calibrations
        return LearnedTokens(bank, self.metadata | other.metadata)

    def calibrated(self, token: str, calibration: Calibration) -> LearnedTokens:
        """The same tokens with the even strengths of one of them, see :func:`tokenlearn.calibration.calibrate`.

        Raises:
            UserError: if there is no such token.
        """
        bank = copy.deepcopy(self.bank)
        bank.rows(token)
        bank.calibrations[token] = calibration
        entries = self.metadata.get(token, {}) | {CALIBRATION: calibration.to_json()}
        return LearnedTokens(bank, self.metadata | {token: entries})

    def save(
        self, folder: str | os.PathLike[str], format: EmbeddingFormat = "a1111", scale: float = 1.0
    ) -> list[Path]:
        """Write an embedding file for each token, named after it.

        Args:
            folder: folder of the files; it is made if it does not exist.
            format: the program that will load them.
            scale: factor on the vectors.

        Raises:
            UserError: if two tokens give the same file name, or a file cannot be written.
        """
        return [
            save_embedding(
                Path(folder).expanduser() / name,
                token,
                self.bank.get(token),
                self.metadata.get(token, {}),
                format,
                scale,
                self.bank.spaces[token],
            )
            for name, token in embedding_file_names(self.placeholders).items()
        ]


def embedding_file_names(tokens: Iterable[str]) -> dict[str, str]:
    """The file name of each token's embedding file, to the token.

    Raises:
        UserError: if two tokens give the same file name, so that one would replace the other, or one gives none.
    """
    named: dict[str, str] = {}
    for token in tokens:
        name = embedding_file_name(token)
        if name in named:
            raise UserError(f"the tokens '{named[name]}' and '{token}' both give the file '{name}'; rename one")
        named[name] = token
    return named


def _paths(name: str) -> list[Path]:
    """A file, or the embedding files of a folder."""
    path = Path(resolve(name)).expanduser()
    if not path.is_dir():
        return [path]
    found = sorted(
        file
        for file in path.iterdir()
        if file.suffix.lower() in _FOLDER_SUFFIXES and file.is_file() and not file.name.startswith(".")
    )
    if not found:
        raise UserError(f"folder '{name}' has no embedding files ({', '.join(_FOLDER_SUFFIXES)}); name another folder")
    return found
