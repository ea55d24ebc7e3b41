"""Loading of diffusers pipelines from folders or the hub."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenlearn.errors import UserError, reason_of, shown
from tokenlearn.paths import resolve
from tokenlearn.quiet import quiet_models

_LIBRARIES = ("diffusers", "transformers")
_SUFFIXES = (".safetensors", ".bin")
_IN_PLACE = find_spec("accelerate") is not None
"""Whether each weight is loaded into its place, without a second model of random ones; diffusers needs accelerate."""


def load_pipeline(
    pipeline_class: Any,  # noqa: ANN401 - diffusers' lazily imported classes have no usable types
    pretrained: str,
    revision: str | None,
    variant: str | None,
    models: Sequence[str],
    **options: object,
) -> Any:  # noqa: ANN401
    """Load a diffusers pipeline in the precision of its files.

    Args:
        pipeline_class: diffusers class that loads it.
        pretrained: hub id or folder.
        revision: branch, tag or commit of the hub repository.
        variant: variant of the weight files, such as ``fp16``; None for the plain files, or for those of ``fp16``
            where there are no others.
        models: components that must be there, by the pipeline's names; beside a ``text_encoder`` there must be its
            ``tokenizer``, and beside a ``text_encoder_2`` its ``tokenizer_2``.
        options: further arguments of the class, such as components to leave out.

    Returns:
        The pipeline.

    Raises:
        UserError: if the folder, one of its files or a weight in them is missing or unreadable, the hub cannot provide
            the model, its index names a class outside of diffusers and transformers, or the model is of a family
            without one of ``models``.
    """
    folder = Path(resolve(pretrained)).expanduser()
    local = folder.is_dir()
    refuse_single_file(pretrained, pipeline_class.__name__)
    if not local and (pretrained.startswith((".", "/", "~")) or pretrained.count("/") != 1):
        # Some old hub ids have no slash, but all models of these layouts that still load have an owner.
        if folder.is_file():
            raise UserError(f"model '{pretrained}' is a file; give the folder of a diffusers pipeline that it is in")
        if "://" in pretrained:
            raise UserError(f"model '{pretrained}' is an address; give its hub id (owner/name), or a local folder")
        raise UserError(
            f"model folder '{pretrained}' does not exist; give an existing folder or a hub id (owner/name)"
        )
    try:
        with quiet_models():
            if not local:
                variant = variant or _only_variant_on_hub(pretrained, revision, models)
                folder = Path(pipeline_class.download(pretrained, revision=revision, variant=variant, **options))
            variant = variant or _only_variant(models, lambda name: (folder / name).is_file())
            variants = _check_folder(folder, variant, models, overridden=options)
            parts = {model: _load_part(folder, model, variants[model], pretrained) for model in models}
            return pipeline_class.from_pretrained(str(folder), low_cpu_mem_usage=_IN_PLACE, **parts, **options)
    except UserError:
        raise
    except Exception as error:  # a damaged folder can fail in any way
        reason = reason_of(error)
        if local:
            raise UserError(f"cannot load the model in '{pretrained}' ({reason}); download it again") from error
        raise UserError(
            f"model '{pretrained}' is not a folder and could not be downloaded from the hub ({reason}); check its "
            "name and the network, or give a local folder"
        ) from error


def refuse_single_file(pretrained: str, pipeline: str = "StableDiffusionPipeline") -> None:
    """Refuse a checkpoint in one file, as web interfaces share them.

    Args:
        pretrained: hub id, folder or file.
        pipeline: diffusers class that converts it.

    Raises:
        UserError: saying how to convert it.
    """
    endings = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
    if pretrained.casefold().endswith(endings) and not Path(resolve(pretrained)).expanduser().is_dir():
        raise UserError(
            f"'{pretrained}' is a checkpoint in a single file, not a folder of a diffusers pipeline; convert it once "
            f"with diffusers: {pipeline}.from_single_file('{pretrained}').save_pretrained('FOLDER'), and "
            "give the folder"
        )


def download_index(pretrained: str, revision: str | None) -> Path:
    """The index of a hub model's components, ``model_index.json``.

    Raises:
        UserError: if the name is not a hub id, or the hub cannot provide the file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if pretrained.startswith((".", "/", "~")) or pretrained.count("/") != 1:
        raise UserError(
            f"model folder '{pretrained}' has no model_index.json; give a folder of a diffusers pipeline or a hub id "
            "(owner/name)"
        )
    try:
        return Path(hf_hub_download(pretrained, "model_index.json", revision=revision))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"model '{pretrained}' is not a folder and could not be downloaded from the hub ({reason_of(error)}); "
            "check its name and the network, or give a local folder"
        ) from error


def _load_part(folder: Path, name: str, variant: str | None, pretrained: str) -> Any:  # noqa: ANN401 - as above
    """A network of a pipeline, all of whose weights are in its files.

    The libraries fill in at random what the files lack, and say so in a warning at most.
    """
    library, class_name = json.loads((folder / "model_index.json").read_text())[name]
    part_class: Any = getattr(import_module(library), class_name)
    options = {"low_cpu_mem_usage": _IN_PLACE} if library == "diffusers" else {}
    part, info = part_class.from_pretrained(str(folder / name), variant=variant, output_loading_info=True, **options)
    check_complete(info["missing_keys"], f"{name} of '{pretrained}'")
    return part


def check_complete(missing: Collection[str], model: str) -> None:
    """Refuse a network some of whose weights are in no file.

    Args:
        missing: names of these weights.
        model: the network in a message.

    Raises:
        UserError: naming the first three of them.
    """
    if missing:
        names = ", ".join(sorted(missing)[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(f"the files of the {model} lack {names}, which would be random; download or export it again")


def _check_index(pretrained: str, index: Any, models: Sequence[str], overridden: Collection[str]) -> None:  # noqa: ANN401 - any JSON
    """Refuse an index of components that is of another family, or names classes outside of the two libraries.

    A name of another library can be that of a Python file in the folder, which some versions of diffusers run.
    """
    if not isinstance(index, Mapping) or not isinstance(index.get("_class_name"), str):
        raise UserError(f"the model_index.json of '{pretrained}' names no pipeline class; download the model again")
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue
        library, class_name = (*entry, None, None)[:2]
        if library is None or (name in overridden and name not in models):
            continue
        if library not in _LIBRARIES:
            raise UserError(
                f"the model_index.json of '{pretrained}' takes '{name}' from {shown(library)}, not from "
                f"{' or '.join(_LIBRARIES)}; code of a model's folder is not run: give a model without it"
            )
        if not isinstance(getattr(import_module(library), str(class_name), None), type):
            raise UserError(
                f"the model_index.json of '{pretrained}' has {shown(class_name)} as '{name}', which the installed "
                f"{library} does not have; give another model, or install another version of {library}"
            )
    for model in models:
        if not isinstance(entry := index.get(model), list) or entry[0] is None:
            raise UserError(
                f"model '{pretrained}' has no '{model}', so it is of another family; choose another "
                "model.backbone.class_path"
            )


def _check_folder(
    folder: Path, variant: str | None, models: Sequence[str], overridden: Collection[str]
) -> dict[str, str | None]:
    """Raise a UserError that names the first component or file that a pipeline's folder lacks.

    Returns:
        The variant of each model's files; diffusers takes the plain file of a component that has none of the variant.
    """
    if not (folder / "model_index.json").is_file():
        raise _missing(folder, "model_index.json")
    _check_index(str(folder), json.loads((folder / "model_index.json").read_text()), models, overridden)
    for name in ("scheduler/scheduler_config.json", *(f"{model}/config.json" for model in models)):
        if not (folder / name).is_file():
            raise _missing(folder, name)
    for model in models:
        if not model.startswith("text_encoder"):
            continue
        tokenizer = model.replace("text_encoder", "tokenizer")
        if not any((folder / tokenizer / name).is_file() for name in ("vocab.json", "tokenizer.json", "spiece.model")):
            raise _missing(folder, f"{tokenizer}/vocab.json")
    variants = {model: _check_weights(folder, model, variant) for model in models}
    if variant is not None and not any(variants.values()):
        warnings.warn(
            f"no part of '{folder}' has files in the variant {variant}, so those without one are loaded; set "
            "model.backbone.variant to null, or to one that it has",
            stacklevel=3,
        )
    return variants


def _check_weights(folder: Path, model: str, variant: str | None) -> str | None:
    """The variant of a component's weight files, None for the plain ones; UserError if one is missing."""
    for found in [variant, None] if variant else [None]:
        files = [folder / model / name for name in _weight_files(model, found)]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            continue
        if file.suffix == ".json":
            for shard in sorted(set(json.loads(file.read_text())["weight_map"].values())):
                if not (folder / model / shard).is_file():
                    raise _missing(folder, f"{model}/{shard}")
        return found
    plain = _weight_files(model, None)[0]
    stem = Path(plain).stem
    variants = sorted({path.name.split(".")[1] for path in (folder / model).glob(f"{stem}.*.safetensors")})
    if variants:
        raise UserError(
            f"model folder '{folder}' has '{model}' in the variant {' or '.join(variants)} alone, not "
            f"{f'in {variant}' if variant else 'without one'}; set model.backbone.variant to it"
        )
    raise _missing(folder, f"{model}/{_weight_files(model, variant)[0]}")


def _weight_files(model: str, variant: str | None) -> list[str]:
    """Names of the files that a component's weights of a variant may be in, and of indices of several files."""
    stems = ["model", "pytorch_model"] if model.startswith("text_encoder") else ["diffusion_pytorch_model"]
    tail = f".{variant}" if variant else ""
    files = [f"{stem}{tail}{suffix}" for stem in stems for suffix in _SUFFIXES]
    return files + [f"{stem}{suffix}.index{tail}.json" for stem in stems for suffix in _SUFFIXES]


def _only_variant_on_hub(pretrained: str, revision: str | None, models: Sequence[str]) -> str | None:
    """As :func:`_only_variant`, of a hub repository; None if the hub cannot be asked, as without a network."""
    from huggingface_hub import list_repo_files

    try:
        files = frozenset(list_repo_files(pretrained, revision=revision))
    except Exception:  # the download that follows says what is wrong, or finds the files in the cache
        return None
    return _only_variant(models, files.__contains__)


def _only_variant(models: Sequence[str], exists: Callable[[str], bool]) -> str | None:
    """``fp16`` if a component has weights of this variant and no plain ones; ``exists`` takes names of files."""

    def has(model: str, variant: str | None) -> bool:
        return any(exists(f"{model}/{name}") for name in _weight_files(model, variant))

    return "fp16" if any(has(model, "fp16") and not has(model, None) for model in models) else None


def _missing(folder: Path, name: str) -> UserError:
    return UserError(f"model folder '{folder}' is incomplete: no '{name}'; download or export the model again")
