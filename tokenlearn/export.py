"""Export: embedding files from a checkpoint, or from an embedding file of another program."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from tokenlearn.errors import UserError
from tokenlearn.tokens.bank import TokenBank
from tokenlearn.tokens.checkpoint import checkpoint_about
from tokenlearn.tokens.embeddings import embedding_file_names
from tokenlearn.tokens.files import EmbeddingFormat, load_embedding, save_embedding


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
        sources = {file.token: (file.vectors, file.metadata)}
    else:
        sources = _checkpoint_tokens(str(ckpt_path))
    for token in tokens or []:
        if token not in sources:
            raise UserError(f"no token '{token}' in '{ckpt_path or embedding}'; it has {', '.join(sources)}")
    written = []
    for name, token in embedding_file_names(tokens or sources).items():
        vectors, metadata = sources[token]
        path = Path(output_dir) / name
        written.append(save_embedding(path, token, vectors, metadata, format, scale))
        print(path)
    return written


def _checkpoint_tokens(path: str) -> dict[str, tuple[list[Tensor], dict[str, str]]]:
    """Vectors and metadata of each token of a checkpoint."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at '{path}'; give a .ckpt file that 'tokenlearn fit' wrote")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"checkpoint '{path}' cannot be read ({type(error).__name__}); it may be truncated") from error
    about = checkpoint_about(checkpoint)
    bank = TokenBank(about["num_vectors"], about["embedding_widths"])
    state = checkpoint["state_dict"]
    bank.load_state_dict({key.removeprefix("bank."): value for key, value in state.items() if key.startswith("bank.")})
    return {token: ([v.detach() for v in bank.get(token)], about["metadata"][token]) for token in bank.placeholders}
