"""The command ``tokenlearn convert``: embedding files of other programs, and for other programs, without torch."""

from __future__ import annotations

from pathlib import Path

from tokenlearn.errors import UserError, shown
from tokenlearn.tokens.files import EmbeddingFile, EmbeddingFormat
from tokenlearn.tokens.files.base import check_token, read_tokens
from tokenlearn.tokens.files.family import wrapped
from tokenlearn.tokens.files.paths import embedding_paths
from tokenlearn.tokens.files.writing import print_written, write_tokens


def convert(
    files: list[str],
    *,
    to: EmbeddingFormat = "a1111",
    output_dir: str = "embeddings",
    token: str | None = None,
    name: str | None = None,
    tokens: list[str] | None = None,
    scale: float = 1.0,
) -> list[Path]:
    """Write embedding files of any known form as files for a program, one for each token in them.

    Args:
        files: embedding files, and folders of them.
        to: the program that will load the files.
        output_dir: folder of the files.
        token: another token for a single one; angle brackets are added if it has none.
        name: name of the file of a single token, which most programs take for the word in prompts; by default the
            token's letters and ``-tl``, which is no word of a vocabulary.
        tokens: the tokens to convert, of those in the files; all by default.
        scale: factor on the vectors: the strength of the tokens.

    Returns:
        Paths of the files.

    Raises:
        UserError: if a file cannot be read, lacks one of ``tokens``, two tokens would be written to the same file, or
            a file of another token is there.
    """
    if not files:
        raise UserError("no files to convert; name embedding files or folders, as in 'tokenlearn convert cat.pt'")
    found = [file for path in embedding_paths(files) for file in read_tokens(path)]
    for wanted in tokens or []:
        if wanted not in {file.token for file in found}:
            names = ", ".join(shown(file.token)[1:-1] for file in found[:6])
            raise UserError(f"no token '{wanted}' in {', '.join(files[:6])}; found {names}")
    chosen = [file for file in found if tokens is None or file.token in tokens]
    if token is not None:
        if len(chosen) != 1:
            raise UserError(f"--token '{token}' names one token, and these are {len(chosen)}; choose one by --tokens")
        chosen = [_renamed(chosen[0], wrapped(token))]
    for file in chosen:
        check_token(file)
    written = write_tokens(chosen, Path(output_dir).expanduser(), to, scale, name)
    print_written(chosen, written, to)
    return written


def _renamed(file: EmbeddingFile, token: str) -> EmbeddingFile:
    """A file's token under another name, in its prompt too."""
    if "prompt" in file.metadata:
        file.metadata = {**file.metadata, "prompt": file.metadata["prompt"].replace(file.token, token)}
    file.token = token
    return file
