"""Learned tokens read from embedding files, and written as embedding files."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from tokenlearn.errors import UserError
from tokenlearn.notices import warn_once
from tokenlearn.paths import resolve
from tokenlearn.tokens.bank import TokenBank
from tokenlearn.tokens.calibration import CALIBRATION, Calibration
from tokenlearn.tokens.compatibility import WordTable, check_vocabularies
from tokenlearn.tokens.files import (
    EmbeddingFile,
    EmbeddingFormat,
    load_embedding,
    read_tokens,
)
from tokenlearn.tokens.files.base import check_token
from tokenlearn.tokens.files.paths import embedding_paths
from tokenlearn.tokens.files.writing import write_tokens
from tokenlearn.tokens.spaces import Space

Embeddings = str | list[str] | dict[str, str]
"""Embedding files in settings: a folder or a file; folders and files; or token to file, which renames the token."""


def load_embeddings(embeddings: Embeddings) -> list[EmbeddingFile]:
    """Read embedding files.

    Args:
        embeddings: a folder or a file; any number of folders and files; or token to file, which renames the token. In
            a folder, the embedding files directly in it count, in the order of their names. A file may hold several
            tokens.

    Raises:
        UserError: if a file cannot be read, a folder has none, or two files name the same token.
    """
    if isinstance(embeddings, Mapping):
        files = [load_embedding(path, token) for token, path in embeddings.items()]
    else:
        names = [embeddings] if isinstance(embeddings, str) else embeddings
        files = [file for path in embedding_paths(names) for file in read_tokens(path)]
    seen: dict[str, Path | None] = {}
    for file in files:
        check_token(file)
        if file.token in seen:
            raise UserError(
                f"'{file.path}' names the token '{file.token}', as '{seen[file.token]}' does; leave one out, or "
                "rename them by {<token>: file}"
            )
        seen[file.token] = file.path
    return files


def load_bank(
    embeddings: Embeddings, embedding_widths: Sequence[int], tables: Sequence[WordTable] | None = None
) -> tuple[TokenBank, list[EmbeddingFile]]:
    """A bank of the tokens of embedding files.

    Args:
        embeddings: at least one file, see :func:`load_embeddings`.
        embedding_widths: width of the input embedding of each text encoder of the backbone.
        tables: words of the backbone's text encoders, to say where files were learned beside others, see
            :func:`tokenlearn.tokens.compatibility.check_vocabularies`.

    Returns:
        The bank, and the contents of the files.

    Raises:
        UserError: if files cannot be read (see :func:`load_embeddings`), or have vectors of another width.
    """
    files = load_embeddings(embeddings)
    for file in files:
        if file.space == "output_place":
            raise UserError(
                f"'{file.path}' has vectors that take the place of the text encoder's output, which only OneTrainer "
                "does; train the embedding there without output embeddings"
            )
        if file.ignored:
            warn_once(f"'{file.path}' has {', '.join(file.ignored)} besides its vectors, which are not used here")
    bank = TokenBank(
        {file.token: len(file.vectors[0]) for file in files},
        embedding_widths,
        {file.token: cast(Space, file.space) for file in files},
    )
    for file in files:
        bank.set(file.token, file.vectors)
        if CALIBRATION in file.metadata:
            bank.calibrations[file.token] = Calibration.from_json(file.metadata[CALIBRATION], file.path)
    if tables is not None:
        check_vocabularies([(file.path, file.metadata) for file in files], tables)
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
        """Write an embedding file for each token, see :func:`tokenlearn.tokens.files.writing.write_tokens`.

        Args:
            folder: folder of the files; it is made if it does not exist.
            format: the program that will load them.
            scale: factor on the vectors.

        Raises:
            UserError: if two tokens give the same file name, a file of another token is there, or a file cannot be
                written.
        """
        files = [
            EmbeddingFile(
                token,
                [part.detach().to("cpu").numpy() for part in self.bank.get(token)],
                self.metadata.get(token, {}),
                space=self.bank.spaces[token],
            )
            for token in self.placeholders
        ]
        return write_tokens(files, Path(folder).expanduser(), format, scale)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload tokens",
        license: str | None = None,
        format: EmbeddingFormat = "a1111",
        endpoint: str | None = None,
    ) -> str:
        """Upload an embedding file for each token to the Hugging Face Hub, with a model card.

        The card has what to type in each program and the judged figures. It replaces a card that an earlier push made;
        one that somebody wrote is left. :func:`tokenlearn.load_tokens` loads the tokens.

        Args:
            repo_id: repository, ``owner/name``; it is made if it does not exist.
            private: whether a new repository is private; None for the owner's default.
            token: access token of the Hub; None for the one that is logged in.
            commit_message: message of the commit.
            license: identifier of a licence for the card, such as ``apache-2.0``; None for that of an earlier card, or
                none.
            format: the program that will load the files.
            endpoint: address of another hub; None for the usual one.

        Returns:
            Address of the repository.

        Raises:
            UserError: if the files cannot be written, or the Hub cannot be reached or refuses.
        """
        from tokenlearn.hub import push

        return push(
            self,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            license=license,
            format=format,
            endpoint=endpoint,
        )
