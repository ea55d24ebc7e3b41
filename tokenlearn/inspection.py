"""The command ``tokenlearn inspect``: what an embedding file is, what reads it, and what to type, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tokenlearn.errors import UserError, shown
from tokenlearn.paths import resolve
from tokenlearn.tokens.files import EmbeddingFile
from tokenlearn.tokens.files.base import check_token, has_known_widths, read_tokens
from tokenlearn.tokens.files.encoders import family_of
from tokenlearn.tokens.files.family import wrapped
from tokenlearn.tokens.files.names import name_warnings
from tokenlearn.tokens.files.paths import embedding_paths
from tokenlearn.tokens.files.programs import how_to_use
from tokenlearn.tokens.files.vocabulary_table import VocabularyTable, vocabulary_tables

_SPACES = {
    "input": "in place of the token's embedding",
    "output": "added to the text encoder's output at all positions",
    "output_content": "added to the text encoder's output from the first content token on",
    "output_place": "in place of the text encoder's output at the token, which only OneTrainer does",
}
_ORIGIN = ("method", "class", "attribute", "step", "name", "sd_checkpoint_name", "judge", "scale")
_VECTORS_AT_MOST = 8  # whose nearest words are printed


def inspect(
    files: list[str],
    *,
    model: str | None = None,
    token: str | None = None,
    nearest: int = 5,
    image: str | None = None,
    prompt: str | None = None,
    seed: int = 1,
    steps: int = 20,
) -> None:
    """Print what embedding files hold: token, vectors, family, norms, nearest words, origin, and what to type.

    Args:
        files: embedding files of any known form, and folders of them.
        model: folder of the model whose vocabulary the vectors are compared with, and which draws; by default the one
            that a file names, if it is on this machine.
        token: another token for a single one, as it is to be written in prompts.
        nearest: number of nearest words of each vector.
        image: PNG file to write, of one token: the prompt without the token and with it.
        prompt: prompt of the image, with the token; by default that of the file.
        seed: seed of the image.
        steps: sampling steps of the image.

    Raises:
        UserError: if a file cannot be read, or an image cannot be made.
    """
    if not files:
        raise UserError("no files to inspect; name embedding files or folders, as in 'tokenlearn inspect cat.pt'")
    found = [file for path in embedding_paths(files) for file in read_tokens(path)]
    if (token is not None or image is not None) and len(found) != 1:
        option = "token" if token is not None else "image"
        raise UserError(f"--{option} is for one token, and these are {len(found)}; name one file")
    tables: dict[str, list[VocabularyTable] | str] = {}
    for file in found:
        file.token = file.token if token is None else wrapped(token)
        name = model or file.metadata.get("base_model")
        if name is not None and name not in tables:
            tables[name] = _tables(name, asked=model is not None)
        print("\n".join(description(file, tables[name] if name is not None else "not named", nearest)))
    if image is not None:
        check_token(found[0])
        _write_image(found[0], model, prompt, seed, steps, Path(image).expanduser())


def description(file: EmbeddingFile, tables: Sequence[VocabularyTable] | str, nearest: int = 5) -> list[str]:
    """Lines about a token.

    Args:
        file: the token.
        tables: vocabulary of each text encoder of its model; or why there is none.
        nearest: number of nearest words of each vector.
    """
    count = len(file.arrays[0])
    widths = ", ".join(f"{part.shape[1]} of {name}" for name, part in zip(file.encoders, file.arrays, strict=True))
    lines = [str(file.path), f"  token     {shown(file.token)[1:-1]}, {count} vector{'s' if count > 1 else ''}"]
    lines.append(f"  vectors   {widths}; {_SPACES[file.space]}")
    lines.append(f"  for       {_family(file)}")
    lines += [f"  {'norms':<9} {line}" for line in _norms(file, tables)]
    lines += [f"  {'nearest':<9} {line}" for line in _nearest(file, tables, nearest)]
    lines += [f"  {'origin':<9} {line}" for line in _origin(file)]
    lines += [f"  {'not read':<9} {key}" for key in file.ignored]
    assert file.path is not None
    lines += [f"  {'name':<9} {warning}" for warning in name_warnings(file.path.stem)]
    return [*lines, "  what to type", *(f"    {line}" for line in how_to_use(file))]


def _family(file: EmbeddingFile) -> str:
    return family_of(file.encoders) if has_known_widths(file) else "a model of other widths than those in use"


def _norms(file: EmbeddingFile, tables: Sequence[VocabularyTable] | str) -> Iterator[str]:
    for index, (name, part) in enumerate(zip(file.encoders, file.arrays, strict=True)):
        norms = ", ".join(f"{norm:.3g}" for norm in np.linalg.norm(part, axis=1)[:_VECTORS_AT_MOST])
        more = ", ..." if len(part) > _VECTORS_AT_MOST else ""
        line = f"{norms}{more} ({name})"
        if file.space != "input":
            yield line
        elif isinstance(tables, str):
            yield f"{line}; the vocabulary's are unknown: the model is {tables}"
        elif index >= len(tables) or tables[index].rows.shape[1] != part.shape[1]:
            yield f"{line}; the model's vectors are of another width"
        else:
            low, high = tables[index].norms()
            largest = float(np.linalg.norm(part, axis=1).max())
            far = f", {largest / high:.1f} times the largest" if largest > 1.5 * high else ""
            yield f"{line}; the vocabulary's {low:.3g} to {high:.3g}{far}"


def _nearest(file: EmbeddingFile, tables: Sequence[VocabularyTable] | str, count: int) -> Iterator[str]:
    if isinstance(tables, str) or file.space != "input":
        return
    for name, part, table in zip(file.encoders, file.arrays, tables, strict=False):
        if table.rows.shape[1] != part.shape[1]:
            continue
        for vector in part[:_VECTORS_AT_MOST]:
            words = ", ".join(f"{word} {cosine:.2f}" for word, cosine in table.nearest(vector, count))
            yield f"{words} ({name}, cosine)"


def _origin(file: EmbeddingFile) -> Iterator[str]:
    about = file.metadata
    if "token" not in about and not about:
        yield "unknown: the file says nothing"
    if "base_model" in about:
        yield f"model {shown(about['base_model'])[1:-1]}, vocabulary {shown(about.get('vocabulary_hash', 'not said'))}"
    for key in (*_ORIGIN, *sorted(key for key in about if key.startswith("judged_"))):
        if key in about:
            yield f"{key.replace('_', ' ')} {shown(about[key])[1:-1]}"


def _tables(name: str, asked: bool) -> list[VocabularyTable] | str:
    """Vocabularies of a model; or where it is, if it was not asked for and is not here."""
    try:
        folder = Path(resolve(name)).expanduser()
    except UserError as error:  # a file may say anything
        if asked:
            raise
        return str(error)
    if not asked and not folder.is_dir():
        return f"{shown(name)}, which is not on this machine; give its folder by --model"
    if not folder.is_dir():
        raise UserError(f"no folder '{folder}'; give the folder of a diffusers pipeline by --model")
    try:
        return vocabulary_tables(folder)
    except UserError as error:
        if asked:
            raise
        return str(error)


def _write_image(
    file: EmbeddingFile, model: str | None, prompt: str | None, seed: int, steps: int, path: Path
) -> None:
    """Write an image of a prompt without the token, left, and with it, right."""
    name = model or file.metadata.get("base_model")
    if name is None:
        raise UserError(f"'{file.path}' does not name its model; give it by --model")
    text = prompt or file.metadata.get("prompt", file.token)
    if file.token not in text:
        raise UserError(f"the prompt '{text}' does not have {file.token}; write it where the token goes")
    from PIL import Image

    from tokenlearn.files import atomic_write
    from tokenlearn.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(name, tokens={file.token: str(file.path)}).with_sampling(steps=steps)
    without = " ".join(text.replace(file.token, " ").split())
    pair = [pipe([words], seeds=[seed])[0] for words in (without, text)]
    both = Image.new("RGB", (2 * pair[0].width, pair[0].height))
    for index, picture in enumerate(pair):
        both.paste(picture, (index * picture.width, 0))
    with atomic_write(path) as temporary:
        both.save(temporary)
    print(f"  image     {path}: '{without}', then '{text}'")
