"""Weights of a classifier from a file of the user: a state dict, a training checkpoint or a pickled model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenlearn.errors import UserError, reason_of, shown

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
"""Suffixes of files that hold weights; ``.tar`` as in the ``model_best.pth.tar`` of timm's training script."""

_STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Entries of a training checkpoint with its weights, averaged ones first, which timm's script tests too."""

_WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")
"""Prefixes of compiled models and of data-parallel ones, in either order."""

_PREPROCESSING = ("mean", "std", "input_size", "crop_pct", "crop_mode", "interpolation")
_SAVE = "torch.save(model.state_dict(), 'weights.pth')"


@dataclass(frozen=True)
class ClassifierWeights:
    """What a file of weights says.

    Attributes:
        state: name to tensor, without the prefixes of wrappers.
        architecture: timm model, None where the file does not name one.
        config: entries of timm's ``pretrained_cfg`` that the file states, such as ``mean`` and ``label_names``.
    """

    state: dict[str, Tensor]
    architecture: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


def read_weights(path: Path) -> ClassifierWeights:
    """Read a file of weights without running anything that is in it.

    Pickles are read by torch's restricted unpickler. Classes and functions that it does not know are replaced by
    objects that hold their state and do nothing, so that the tensors of a pickled model can be picked out.

    Args:
        path: a file of safetensors, or one that ``torch.save`` wrote: a state dict, a training checkpoint of timm or
            Lightning, or a whole model.

    Raises:
        UserError: if the file cannot be read, would run code, or has no weights.
    """
    if path.suffix == ".safetensors":
        try:
            return ClassifierWeights(load_file(path))
        except Exception as error:  # a damaged file can fail in any way
            raise UserError(f"cannot read the weights '{path}' ({reason_of(error)}); save them again") from error
    content = _unpickled(path)
    found = _of_model(content) if isinstance(content, _Inert) else _of_checkpoint(content)
    if found is None or not found.state:
        raise UserError(
            f"'{path}' holds no weights that can be read without running its code; save them by {_SAVE} and name the "
            "architecture"
        )
    return found


def build_classifier(weights: ClassifierWeights, architecture: str, path: Path) -> nn.Module:
    """A timm model with the weights of a file.

    Args:
        weights: the weights. Entries outside of the model, such as those of a loss, are left out.
        architecture: timm model.
        path: the file, for messages.

    Raises:
        UserError: if the weights are of another architecture.
    """
    import timm

    config = timm.get_pretrained_cfg(architecture)
    head = (config.classifier if config is not None else None) or "fc"
    head = head if isinstance(head, str) else head[0]
    places = [name for name in weights.state if f".{name}".endswith(f".{head}.weight")]
    if not places:
        raise UserError(
            f"the weights '{path}' have no last layer '{head}' of {architecture}, but begin with "
            f"{', '.join(map(shown, list(weights.state)[:3]))}; correct the architecture"
        )
    place = min(places, key=len)
    prefix, num_classes = place.removesuffix(f"{head}.weight"), len(weights.state[place])
    model: Any = timm.create_model(architecture, pretrained=False, num_classes=num_classes)
    state = {name.removeprefix(prefix): tensor for name, tensor in weights.state.items() if name.startswith(prefix)}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = _difference(model, state) or reason_of(error)
        raise UserError(
            f"the weights '{path}' are not of {architecture}: {reason}; correct the architecture"
        ) from error
    own = {name: value for name, value in model.pretrained_cfg.items() if name != "label_names"}
    model.pretrained_cfg = own | weights.config | {"num_classes": num_classes}
    return cast(nn.Module, model)


class _Inert:
    """An object of a pickle in place of one of any class: it holds the state and does nothing."""

    def __new__(cls, *arguments: object, **options: object) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _unpickled(path: Path) -> Any:  # noqa: ANN401 - whatever was saved
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats, which are as good
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) if _is_zip(path) else []
            with torch.serialization.safe_globals([(_Inert, name) for name in foreign]):
                return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"'{path}' is a pickle that would run code when it is read, which is refused; save the weights by {_SAVE} "
            "and name the architecture"
        ) from error
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(f"cannot read the weights '{path}' ({reason_of(error)}); save them again") from error


def _is_zip(path: Path) -> bool:
    """Whether a file is of the format of torch 1.6 and newer; older ones have no list of what they name."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _of_checkpoint(content: Any) -> ClassifierWeights | None:  # noqa: ANN401 - whatever was saved
    if not isinstance(content, Mapping):
        return None
    for key in _STATE_KEYS:
        inner = content.get(key)
        if isinstance(inner, _Inert):
            return _of_model(inner)
        if isinstance(inner, Mapping) and inner:
            return ClassifierWeights(_tensors(inner), _architecture_of(content), _arguments_of(content.get("args")))
    return ClassifierWeights(_tensors(content))


def _of_model(model: _Inert) -> ClassifierWeights | None:
    state: dict[str, Any] = {}
    _collect(model, "", state)
    config = next((found for part in _parts(model) if (found := _config_of(part))), {})
    architecture = config.get("architecture")
    known = {name: config[name] for name in (*_PREPROCESSING, "label_names") if config.get(name) is not None}
    return ClassifierWeights(_tensors(state), architecture if isinstance(architecture, str) else None, known)


def _parts(model: _Inert) -> list[_Inert]:
    """A model, and what wrappers such as those of data-parallel training hold."""
    inner = vars(model).get("_modules", {}).get("module")
    return [model, inner] if isinstance(inner, _Inert) else [model]


def _config_of(model: _Inert) -> dict[str, Any]:
    config = vars(model).get("pretrained_cfg")
    return config if isinstance(config, dict) else {}


def _collect(module: Any, prefix: str, state: dict[str, Any]) -> None:  # noqa: ANN401 - whatever was saved
    """Add the parameters and persistent buffers of a module, as ``Module.state_dict`` names them."""
    if not isinstance(module, _Inert):
        return
    inside = vars(module)
    left_out = inside.get("_non_persistent_buffers_set", ())
    state |= {f"{prefix}{name}": value for name, value in inside.get("_parameters", {}).items()}
    state |= {f"{prefix}{name}": value for name, value in inside.get("_buffers", {}).items() if name not in left_out}
    for name, part in inside.get("_modules", {}).items():
        _collect(part, f"{prefix}{name}.", state)


def _tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, by names without the prefixes of wrappers."""
    tensors = {}
    for name, value in state.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            for wrapper in _WRAPPERS:
                name = name.removeprefix(wrapper)
            tensors[name] = value.detach()
    return tensors


def _architecture_of(checkpoint: Mapping[str, Any]) -> str | None:
    architecture = checkpoint.get("arch")
    return architecture if isinstance(architecture, str) else None


def _arguments_of(arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever was saved
    """Preprocessing among the arguments of timm's training script."""
    given = vars(arguments) if isinstance(arguments, _Inert) else {}
    found = {name: given[name] for name in _PREPROCESSING if given.get(name) is not None}
    if isinstance(side := given.get("img_size"), int) and "input_size" not in found:
        found["input_size"] = (3, side, side)
    return found


def _difference(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """The first difference between a model and weights; empty if there is none."""
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            return f"they lack '{name}'"
        if state[name].shape != tensor.shape:
            return f"'{name}' has shape {list(state[name].shape)}, not {list(tensor.shape)}"
    return next((f"they have {shown(name)}, which it lacks" for name in state if name not in expected), "")
