"""Export: embedding files of the tokens of a checkpoint, and how the tokens are written in prompts."""

from __future__ import annotations

from pathlib import Path

from tokenlearn.errors import UserError
from tokenlearn.tokens.bank import TokenBank
from tokenlearn.tokens.checkpoint import checkpoint_about, read_checkpoint
from tokenlearn.tokens.files import EmbeddingFile, EmbeddingFormat
from tokenlearn.tokens.files.writing import print_written, write_tokens


def export(
    ckpt_path: str | None = None,
    embedding: str | None = None,
    *,
    format: EmbeddingFormat = "a1111",
    output_dir: str = "embeddings",
    scale: float = 1.0,
    tokens: list[str] | None = None,
    name: str | None = None,
) -> list[Path]:
    """Write learned tokens as embedding files, one per token.

    Args:
        ckpt_path: checkpoint that ``tokenlearn fit`` wrote.
        embedding: embedding file of any known form, to convert, instead of a checkpoint; ``tokenlearn convert`` takes
            several files and folders.
        format: the program that will load the files.
        output_dir: folder of the files.
        scale: factor on the vectors: the strength of the tokens.
        tokens: placeholders to export; all by default.
        name: name of the file of a single token, which most programs take for the word in prompts; by default the
            token's letters and ``-tl``, which is no word of a vocabulary.

    Returns:
        Paths of the files.

    Raises:
        UserError: if neither or both sources are given, the source cannot be read, it lacks one of ``tokens``, two
            tokens would be written to the same file, or a file of another token is there.
    """
    if (ckpt_path is None) == (embedding is None):
        raise UserError("give either --ckpt_path or --embedding, the source of the tokens")
    if embedding is not None:
        from tokenlearn.conversion import convert

        return convert([embedding], to=format, output_dir=output_dir, scale=scale, tokens=tokens, name=name)
    sources = _checkpoint_tokens(str(ckpt_path))
    for token in tokens or []:
        if token not in sources:
            raise UserError(f"no token '{token}' in '{ckpt_path}'; it has {', '.join(sources)}")
    chosen = [sources[token] for token in tokens or sources]
    written = write_tokens(chosen, Path(output_dir).expanduser(), format, scale, name)
    print_written(chosen, written, format)
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
            token,
            [part.detach().numpy() for part in bank.get(token)],
            about["metadata"][token],
            space=bank.spaces[token],
        )
        for token in bank.placeholders
    }
