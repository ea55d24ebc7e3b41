"""Export: embedding files from a checkpoint, or from an embedding file of another program."""

from __future__ import annotations

from pathlib import Path

from tokenlearn.errors import UserError
from tokenlearn.tokens.bank import TokenBank
from tokenlearn.tokens.checkpoint import checkpoint_about, read_checkpoint
from tokenlearn.tokens.embeddings import embedding_file_names
from tokenlearn.tokens.files import EmbeddingFile, EmbeddingFormat, load_embedding, save_embedding


def export(
    ckpt_path: str | None = None,
    embedding: str | None = None,
    *,
    format: EmbeddingFormat = "a1111",
    output_dir: str = "embeddings",
    scale: float = 1.0,
    tokens: list[str] | None = None,
) -> list[Path]:
    """Write learned tokens as embedding files, one per token.

    Args:
        ckpt_path: checkpoint that ``tokenlearn fit`` wrote.
        embedding: embedding file of any known form, to convert, instead of a checkpoint.
        format: the program that will load the files.
        output_dir: folder of the files, which are named after the tokens.
        scale: factor on the vectors: the strength of the tokens.
        tokens: placeholders to export; all by default.

    Returns:
        Paths of the files.

    Raises:
        UserError: if neither or both sources are given, the source cannot be read, it lacks one of ``tokens``, or
            two tokens would be written to the same file.
    """
    if (ckpt_path is None) == (embedding is None):
        raise UserError("give either --ckpt_path or --embedding, the source of the tokens")
    if embedding is not None:
        file = load_embedding(embedding)
        sources = {file.token: file}
    else:
        sources = _checkpoint_tokens(str(ckpt_path))
    for token in tokens or []:
        if token not in sources:
            raise UserError(f"no token '{token}' in '{ckpt_path or embedding}'; it has {', '.join(sources)}")
    written = []
    for name, token in embedding_file_names(tokens or sources).items():
        file = sources[token]
        path = Path(output_dir).expanduser() / name
        written.append(save_embedding(path, token, file.vectors, file.metadata, format, scale, file.space))
        print(path)
    return written


def _checkpoint_tokens(path: str) -> dict[str, EmbeddingFile]:
    """The tokens of a checkpoint, each as its file will be."""
    checkpoint = read_checkpoint(Path(path).expanduser())
    about = checkpoint_about(checkpoint)
    bank = TokenBank(about["num_vectors"], about["embedding_widths"], about.get("spaces"))
    state = checkpoint["state_dict"]
    bank.load_state_dict({key.removeprefix("bank."): value for key, value in state.items() if key.startswith("bank.")})
    return {
        token: EmbeddingFile(
            token, [part.detach() for part in bank.get(token)], about["metadata"][token], space=bank.spaces[token]
        )
        for token in bank.placeholders
    }
