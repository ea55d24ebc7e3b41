"""Loading of diffusers pipelines from folders or the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenlearn.errors import UserError, reason_of
from tokenlearn.paths import resolve
from tokenlearn.quiet import quiet_models


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
        variant: variant of the weight files, such as ``fp16``; None for the plain files, or for those of ``fp16`` in a
            folder that has no others.
        models: components that must be there, by the pipeline's names; beside a ``text_encoder`` there must be its
            ``tokenizer``, and beside a ``text_encoder_2`` its ``tokenizer_2``.
        options: further arguments of the class, such as components to leave out.

    Returns:
        The pipeline.

    Raises:
        UserError: if the folder or one of its files is missing or unreadable, the hub cannot provide the model, or the
            model is of a family without one of ``models``.
    """
    from safetensors import SafetensorError

    folder = Path(resolve(pretrained)).expanduser()
    local = folder.is_dir()
    refuse_single_file(pretrained, pipeline_class.__name__)
    if not local and (pretrained.startswith((".", "/", "~")) or pretrained.count("/") != 1):
        # Some old hub ids have no slash, but all models of these layouts that still load have an owner.
        raise UserError(
            f"model folder '{pretrained}' does not exist; give an existing folder or a hub id (owner/name)"
        )
    try:
        if local:
            variant = variant or _only_variant(folder, models)
            _check_folder(folder, variant, models)
        with quiet_models():
            pipeline = pipeline_class.from_pretrained(
                str(folder) if local else pretrained,
                revision=revision,
                variant=variant,
                # Loads each weight into its place, without a second model of random ones.
                low_cpu_mem_usage=find_spec("accelerate") is not None,
                **options,
            )
        _check_family(pretrained, pipeline.config, models)
    except UserError:
        raise
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        reason = reason_of(error)
        if local:
            raise UserError(f"cannot load the model in '{pretrained}' ({reason}); download it again") from error
        raise UserError(
            f"model '{pretrained}' is not a folder and could not be downloaded from the hub ({reason}); check its "
            "name and the network, or give a local folder"
        ) from error
    return pipeline


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


def _check_family(pretrained: str, index: Mapping[str, Any], models: Sequence[str]) -> None:
    """Raise a UserError if a pipeline's index of components has none of a name."""
    for model in models:
        library, _ = index.get(model) or (None, None)
        if library is None:
            raise UserError(
                f"model '{pretrained}' has no '{model}', so it is of another family; choose another "
                "model.backbone.class_path"
            )


def _check_folder(folder: Path, variant: str | None, models: Sequence[str]) -> None:
    """Raise a UserError that names the first component or file that a pipeline's folder lacks."""
    # diffusers takes the plain file of a component that has none of the variant.
    tails = [f".{variant}", ""] if variant else [""]
    if not (folder / "model_index.json").is_file():
        raise _missing(folder, "model_index.json")
    _check_family(str(folder), json.loads((folder / "model_index.json").read_text()), models)
    for name in ("scheduler/scheduler_config.json", *(f"{model}/config.json" for model in models)):
        if not (folder / name).is_file():
            raise _missing(folder, name)
    for model in models:
        if not model.startswith("text_encoder"):
            continue
        tokenizer = model.replace("text_encoder", "tokenizer")
        if not any((folder / tokenizer / name).is_file() for name in ("vocab.json", "tokenizer.json", "spiece.model")):
            raise _missing(folder, f"{tokenizer}/vocab.json")
    for model in models:
        names = _weight_files(model, tails)
        found = [folder / model / name for name in names if (folder / model / name).is_file()]
        if not found:
            raise _missing(folder, f"{model}/{names[0]}")
        if (index := found[0]).suffix != ".json":
            continue
        for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            if not (folder / model / shard).is_file():
                raise _missing(folder, f"{model}/{shard}")


def _weight_files(model: str, tails: Sequence[str]) -> list[str]:
    """Names of the files that a component's weights may be in."""
    stems = ["model", "pytorch_model"] if model.startswith("text_encoder") else ["diffusion_pytorch_model"]
    files = [f"{stem}{tail}{suffix}" for stem in stems for tail in tails for suffix in (".safetensors", ".bin")]
    return files + [f"{stem}.safetensors.index{tail}.json" for stem in stems for tail in tails]


def _only_variant(folder: Path, models: Sequence[str]) -> str | None:
    """``fp16`` if a component of a folder has weights of this variant and no plain ones."""

    def has(model: str, tail: str) -> bool:
        return any((folder / model / name).is_file() for name in _weight_files(model, [tail]))

    return "fp16" if any(has(model, ".fp16") and not has(model, "") for model in models) else None


def _missing(folder: Path, name: str) -> UserError:
    return UserError(f"model folder '{folder}' is incomplete: no '{name}'; download or export the model again")
