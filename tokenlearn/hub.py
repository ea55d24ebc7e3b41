"""Tokens on the Hugging Face Hub: pushed with a model card, and loaded by a repository's id."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenlearn.errors import UserError, reason_of, shown
from tokenlearn.notices import notice
from tokenlearn.paths import resolve
from tokenlearn.tokens.embeddings import LearnedTokens, load_bank
from tokenlearn.tokens.files import EmbeddingFile, EmbeddingFormat, read_tokens
from tokenlearn.tokens.files.paths import embedding_paths
from tokenlearn.tokens.files.programs import what_to_type
from tokenlearn.tokens.files.writing import portable_model_name

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelCard

CARD = "README.md"
"""Name of a repository's model card."""

_MARK = "<!-- written by tokenlearn -->"  # of a card that a later push may replace
_SUFFIXES = (".safetensors", ".pt", ".bin")
_MOST_BYTES = 2**28  # of an embedding file; larger ones are whole models
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_TAGS = ["textual_inversion", "text-to-image", "tokenlearn"]


def load_tokens(
    folder_or_repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> LearnedTokens:
    """Tokens of a folder or a file of embeddings, or of a repository of the Hub.

    Of a repository, only the embedding files at its top are downloaded, into the Hub's cache; offline, those that are
    there already are used. A token whose file is there in several forms is read from the safetensors file.

    Args:
        folder_or_repo_id: a folder or a file on this machine, or ``owner/name``.
        revision: branch, tag or commit of the repository.
        token: access token of the Hub; None for the one that is logged in.
        endpoint: address of another hub; None for the usual one.

    Returns:
        The tokens with the metadata of their files.

    Raises:
        UserError: if there is neither, the Hub cannot be reached or refuses, there is no embedding file, or files are
            for different models.
    """
    local = Path(resolve(folder_or_repo_id)).expanduser()
    if local.exists():
        paths = embedding_paths([str(local)])
    elif _REPOSITORY.fullmatch(folder_or_repo_id):
        paths = _download(folder_or_repo_id, revision, token, endpoint)
    else:
        raise UserError(
            f"no folder or file '{folder_or_repo_id}', and it is no id of a repository, such as owner/name; give one "
            "or the other"
        )
    return _tokens_of(paths)


def push(
    tokens: LearnedTokens,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload tokens",
    license: str | None = None,
    format: EmbeddingFormat = "a1111",
    endpoint: str | None = None,
) -> str:
    """See :meth:`tokenlearn.tokens.LearnedTokens.push_to_hub`."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token)
    with tempfile.TemporaryDirectory() as name, _one_line(repo_id, api.endpoint):
        folder = Path(name)
        paths = tokens.save(folder, format)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with its owner
        old = _card_there(api, repo_id)
        if old is None or _MARK in old.content:
            kept = license or (None if old is None else old.data.get("license"))
            files = [file for path in paths for file in read_tokens(path)]
            (folder / CARD).write_text(str(model_card(files, repo_id, kept)), encoding="utf-8")
        else:
            notice(f"the model card of '{repo_id}' was not written by tokenlearn and is left as it is")
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return f"{api.endpoint}/{repo_id}"


def model_card(files: Sequence[EmbeddingFile], repo_id: str, license: str | None = None) -> ModelCard:
    """The model card of tokens: what to type in each program, the judged figures, and how to load them.

    Args:
        files: the tokens, read from their files.
        repo_id: repository that the card is for.
        license: identifier of a licence, such as ``apache-2.0``; None leaves the choice open.
    """
    from huggingface_hub import ModelCard, ModelCardData

    models = list(dict.fromkeys(file.metadata["base_model"] for file in files if "base_model" in file.metadata))
    names = [portable_model_name(model) for model in models]
    data = ModelCardData(
        base_model=[name for name in names if _REPOSITORY.fullmatch(name) and not Path(resolve(name)).exists()]
        or None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=_TAGS,
        license=license,
    )
    text = [_MARK, "", f"# {repo_id.rpartition('/')[2]}", "", *_about(files, names), "", *_uses(files)]
    if judged := _judged(files):
        text += ["", "## Judged", "", *judged]
    text += ["", "## Load", "", *_load(files, repo_id)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text) + "\n")


def _about(files: Sequence[EmbeddingFile], models: Sequence[str]) -> list[str]:
    several = len(files) > 1
    origin = f", learned on {', '.join(f'`{name}`' for name in models)}" if models else ""
    return [
        f"{len(files)} learned token{'s' if several else ''} for a frozen text-to-image diffusion model{origin}: "
        f"embedding files of {files[0].arrays[0].shape[1]} numbers a vector"
        + (f" and text encoder ({', '.join(files[0].encoders)})." if len(files[0].encoders) > 1 else ".")
    ]


def _uses(files: Sequence[EmbeddingFile]) -> list[str]:
    """A table of what to type in each program that reads the files."""
    typed = [what_to_type(file) for file in files]
    programs = [name for name in typed[0] if all(name in of_file for of_file in typed)]
    rows = [
        [_code(Path(file.path or "").name), *(_code(use[name]) for name in programs)]
        for file, use in zip(files, typed, strict=True)
    ]
    return ["## What to type", "", *_table(["file", *programs], rows)]


def _judged(files: Sequence[EmbeddingFile]) -> list[str]:
    """A table of judged figures; nothing if no file has any."""
    keys = sorted({key for file in files for key in file.metadata if key.startswith("judged_")})
    if not keys:
        return []
    rows = [
        [_code(file.token), *(_cell(file.metadata.get(key, "-")) for key in ("class", *keys, "judge"))]
        for file in files
    ]
    note = "The judge is a classifier that the tokens were not trained on. Each figure is its score on fresh images."
    return [*_table(["token", "class", *(key.replace("_", " ") for key in keys), "judge"], rows), "", note]


def _load(files: Sequence[EmbeddingFile], repo_id: str) -> list[str]:
    first = files[0]
    lines = [
        "```python",
        "import tokenlearn as tl",
        "",
        f'tokens = tl.load_tokens("{repo_id}")',
        "pipe = tl.Pipeline.from_pretrained(..., tokens=tokens)",
        "```",
    ]
    if len(first.encoders) == 1 and first.space == "input" and first.path is not None:
        lines += [
            "",
            "In diffusers:",
            "",
            "```python",
            f'pipe.load_textual_inversion("{repo_id}", weight_name="{first.path.name}", token="{first.token}")',
            "```",
        ]
    return lines


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _code(text: str) -> str:
    """Text as code in a cell of a table."""
    return f"`{_cell(text).replace('`', '')}`"


def _cell(text: str) -> str:
    """Text of a cell of a table."""
    return shown(text, 200)[1:-1].replace("|", r"\|")


def _card_there(api: HfApi, repo_id: str) -> ModelCard | None:
    """The model card of a repository, None if it has none."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = api.hf_hub_download(repo_id, CARD)
    except EntryNotFoundError:
        return None
    return ModelCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True)


def _download(repo_id: str, revision: str | None, token: str | None, endpoint: str | None) -> list[Path]:
    """Embedding files of a repository, in the Hub's cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=endpoint, token=token)
    with _one_line(repo_id, api.endpoint):
        try:
            entries = list(api.list_repo_tree(repo_id, revision=revision))
            sizes = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
            names = _embedding_names(sizes)
            if not names:
                raise UserError(f"'{repo_id}' has no embedding files ({', '.join(_SUFFIXES)}) at its top")
        except (HfHubHTTPError, UserError):
            raise
        except Exception:  # of the HTTP library, where nothing answers: what is in the cache is asked for below
            names = [f"*{suffix}" for suffix in _SUFFIXES]
        folder = Path(
            snapshot_download(repo_id, revision=revision, token=token, endpoint=endpoint, allow_patterns=names)
        )
    found = _embedding_names({path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()})
    return [folder / name for name in found]


def _embedding_names(sizes: Mapping[str, int]) -> list[str]:
    """Names at the top of a repository that can be embeddings; of one stem, the safetensors file."""
    names = sorted(name for name, size in sizes.items() if "/" not in name and size <= _MOST_BYTES)
    chosen: dict[str, str] = {}
    for suffix in reversed(_SUFFIXES):
        chosen |= {name.removesuffix(suffix): name for name in names if name.endswith(suffix)}
    return sorted(chosen.values())


def _tokens_of(paths: Sequence[Path]) -> LearnedTokens:
    files = [file for path in paths for file in read_tokens(path)]
    for file in files[1:]:
        if file.encoders != files[0].encoders or _widths(file) != _widths(files[0]):
            raise UserError(
                f"'{file.path}' is for text encoders of widths {_widths(file)}, '{files[0].path}' of "
                f"{_widths(files[0])}; load tokens of one model together"
            )
    bank, read = load_bank([str(path) for path in paths], _widths(files[0]))
    return LearnedTokens(bank, {file.token: file.metadata for file in read})


def _widths(file: EmbeddingFile) -> list[int]:
    return [part.shape[1] for part in file.arrays]


@contextmanager
def _one_line(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one line for the user.

    Raises:
        UserError: naming the repository, the reason and the way out.
    """
    from huggingface_hub import errors

    reasons: list[tuple[Any, Callable[[Any], str]]] = [
        (
            errors.HFValidationError,
            lambda error: f"'{repo_id}' is no id of a repository ({reason_of(error)}); write owner/name",
        ),
        (
            (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError),
            lambda error: (
                f"'{repo_id}' is not in the cache and {endpoint} cannot be reached; check the connection, "
                "and that HF_HUB_OFFLINE is not set"
            ),
        ),
        (
            errors.RevisionNotFoundError,
            lambda error: f"'{repo_id}' has no such revision; give a branch, tag or commit of it",
        ),
        (
            errors.RepositoryNotFoundError,
            lambda error: (
                f"no repository '{repo_id}' at {endpoint}, or it is private; check its id, or log in by "
                "'hf auth login'"
            ),
        ),
        (
            errors.HfHubHTTPError,
            lambda error: _refused(repo_id, endpoint, error),
        ),
    ]
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of whatever HTTP library the client is built on, too
        for kinds, message in reasons:
            if isinstance(error, kinds):
                raise UserError(message(error)) from None
        raise UserError(f"{endpoint} cannot be reached ({reason_of(error)}); check the connection") from None


def _refused(repo_id: str, endpoint: str, error: Any) -> str:  # noqa: ANN401 - of the client's HTTP library
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"{endpoint} wants an access token; log in by 'hf auth login', set HF_TOKEN, or pass token="
    if status == 403:
        return f"the access token may not write to '{repo_id}'; use one with write access to {repo_id.split('/')[0]}"
    return f"{endpoint} refused '{repo_id}' ({reason_of(error)}); try again later"
