"""Frozen timm classifiers, by name or from a folder in timm's layout."""

from __future__ import annotations

import copy
import difflib
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenlearn.errors import UserError, reason_of
from tokenlearn.models.classifier_weights import WEIGHT_SUFFIXES, build_classifier, read_weights
from tokenlearn.models.frozen import FrozenModule, Precision, freeze, require_finite
from tokenlearn.paths import resolve


class TimmClassifier(FrozenModule):
    """A frozen timm classifier with differentiable preprocessing of image tensors.

    Label names come from ``label_names`` in the model's ``config.json``. Without that key, ImageNet models use the
    first word of each class in WordNet, and other models use indices. ``"multi_label": true`` beside ``architecture``
    in ``config.json`` marks a model with independent sigmoids; timm ignores unknown keys only at that place.

    Files of weights are read without running what is in them: state dicts, checkpoints of timm's training script
    (averaged weights first) and of Lightning, and pickled timm models.

    Args:
        pretrained: timm model name (``resnet18.a1_in1k``), hub model (``hf-hub:owner/name``), folder with
            ``config.json`` and ``model.safetensors``, or a file of weights (``shirts.pth``).
        dtype: precision of the weights, whatever their stored type.
        architecture: timm model that a file of weights is of; null where the file says it.
        label_names: name of each output, or index to name of some; null for the model's own.
        mean: mean of each of the three channels in [0, 1] that inputs are normalised by; null for the model's own, as
            for the following settings.
        std: standard deviation of each channel.
        input_size: height and width of inputs, or one number for both.
        crop_pct: share of the image's shorter side that is cropped.
        multi_label: whether outputs are independent sigmoids.

    Attributes:
        pretrained: as given.
        num_classes: number of outputs.
        label_names: name of each output.
        multi_label: whether outputs are independent sigmoids instead of one softmax.

    Raises:
        UserError: if the folder or one of its files is missing or unreadable, the name is unknown, the hub cannot
            provide the model, a file of weights is of another architecture, or a setting is out of range.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        pretrained: str,
        dtype: Precision = "float32",
        *,
        architecture: str | None = None,
        label_names: list[str] | dict[int, str] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        input_size: list[int] | int | None = None,
        crop_pct: float | None = None,
        multi_label: bool | None = None,
    ) -> None:
        super().__init__()
        from timm.data.config import resolve_model_data_config
        from timm.data.transforms_factory import create_transform

        preprocessing = _given_preprocessing(mean, std, input_size, crop_pct)
        self.model, config = _loaded(pretrained, architecture)
        _check_loaded(pretrained, self.model)
        self.pretrained = pretrained
        self.num_classes = int(self.model.num_classes)
        self.multi_label = bool(config.get("multi_label", False)) if multi_label is None else multi_label
        self.label_names, self._aliases = _labels(self.model, pretrained, label_names)
        if len(self.label_names) != self.num_classes:
            raise UserError(
                f"classifier '{pretrained}' has {self.num_classes} outputs but {len(self.label_names)} label names; "
                f"correct 'label_names'{' in its config.json' if label_names is None else ''}"
            )
        data: dict[str, Any] = resolve_model_data_config(self.model) | preprocessing  # type: ignore[no-untyped-call]
        if data["crop_mode"] == "border":
            raise UserError(
                f"classifier '{pretrained}' pads its inputs (crop mode 'border'), which is not supported; give a "
                "classifier with crop mode 'center' or 'squash'"
            )
        if not all(math.isfinite(mean) for mean in data["mean"]) or not all(0 < std < math.inf for std in data["std"]):
            raise UserError(
                f"classifier '{pretrained}' normalises by mean {data['mean']} and std {data['std']}; correct them in "
                "its config.json or in the settings to finite numbers, the std above 0"
            )
        if data["interpolation"] not in ("bilinear", "bicubic", "nearest"):
            data["interpolation"] = "bicubic"  # torch has no Lanczos filter; bicubic is the closest antialiased one
        # timm's resize and crop also work on batches of tensors, with antialiasing and gradients.
        self._resize_and_crop = create_transform(**data, normalize=False)
        self.register_buffer("mean", torch.tensor(data["mean"]).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(data["std"]).reshape(1, 3, 1, 1), persistent=False)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self.model.to(self._dtype)
        freeze(self)

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize with antialiasing, centre crop and normalise as timm's evaluation transform does, differentiably.

        Args:
            images: (B, 3, H, W) in [0, 1]; values outside are not clamped, so they keep their gradient.

        Returns:
            (B, 3, h, w) network inputs.
        """
        cropped: Tensor = self._resize_and_crop(images)
        return (cropped - self.mean) / self.std

    def _inputs(self, images: Tensor) -> Tensor:
        """Network inputs in the network's precision."""
        return self.preprocess(images).to(self._dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Classify.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            (B, num_classes) float32 logits.

        Raises:
            UserError: if they are not finite, unless they have a gradient.
        """
        logits: Tensor = self.model(self._inputs(images))
        return require_finite(logits.float(), images, self.pretrained)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features, the input of the last layer.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            (B, F) float32 features.

        Raises:
            UserError: if they are not finite, unless they have a gradient.
        """
        features: Tensor = self.model.forward_head(self.model.forward_features(self._inputs(images)), pre_logits=True)
        return require_finite(features.float(), images, self.pretrained)

    def trunk_features(self, images: Tensor) -> Tensor:
        """Features at every position of the trunk's last feature map, before pooling.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            (B, P, F) float32 features at P positions.
        """
        maps: Tensor = self.model.forward_features(self._inputs(images))
        if maps.ndim == 4 and getattr(self.model, "output_fmt", "NCHW") == "NCHW":
            maps = maps.movedim(1, -1)
        return maps.flatten(1, -2).float()

    def classify(self, features: Tensor) -> Tensor:
        """Logits (B, num_classes) of penultimate features (B, F): ``classify(features(x))`` is ``forward(x)``."""
        return functional.linear(features, self.head_weight.to(features), self.head_bias.to(features))

    @property
    def head_weight(self) -> Tensor:
        """(num_classes, F) float32 weight of the last layer."""
        return self._head().weight.float()

    @property
    def head_bias(self) -> Tensor:
        """(num_classes,) float32 bias of the last layer; zeros for a layer without bias."""
        head = self._head()
        return (head.weight.new_zeros(self.num_classes) if head.bias is None else head.bias).float()

    def label_index(self, name: str | int) -> int:
        """Index of the output of a class.

        Args:
            name: a label name, or any synonym in the model's label descriptions. Case does not matter, and an
                underscore equals a space. Or an index, as a number or, where no label has that name, in digits.

        Returns:
            Index in [0, num_classes).

        Raises:
            UserError: if the model has no class of this name, or several.
        """
        if isinstance(name, str) and name in self.label_names:
            return self.label_names.index(name)
        if isinstance(name, int) or name.strip().isdecimal():
            index = int(name)
            if 0 <= index < self.num_classes:
                return index
            raise UserError(
                f"classifier '{self.pretrained}' has no class {index}; its {self.num_classes} classes are numbered "
                "from 0"
            )
        matches = self._aliases.get(_normalised(name), [])
        if len(matches) == 1:
            return matches[0]
        if matches:
            names = ", ".join(f"'{self.label_names[index]}'" for index in matches)
            raise UserError(
                f"class '{name}' of classifier '{self.pretrained}' is ambiguous between {names}; name one of them"
            )
        near = difflib.get_close_matches(_normalised(name), self._aliases, n=5)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"it has {', '.join(self.label_names[:12])}"
        if not near and self.num_classes > 12:
            hint += f" and {self.num_classes - 12} more"
        raise UserError(f"classifier '{self.pretrained}' has no class '{name}'; {hint}")

    def _head(self) -> nn.Linear:
        head = self.model.get_classifier()
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"the last layer of classifier '{self.pretrained}' is a {type(head).__name__}, expected Linear; give "
                "another classifier"
            )
        return head


def save_classifier(
    model: nn.Module,
    folder: str | os.PathLike[str],
    label_names: Sequence[str],
    multi_label: bool = False,
    data_config: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> Path:
    """Write a timm model to a folder in timm's layout: ``config.json`` and half-precision ``model.safetensors``.

    ``timm.create_model("local-dir:<folder>", pretrained=True)`` and :class:`TimmClassifier` load the folder.

    Args:
        model: a model from ``timm.create_model``; it is not changed.
        folder: output folder; created if it does not exist.
        label_names: name of each output.
        multi_label: whether outputs are independent sigmoids.
        data_config: preprocessing settings that differ from the architecture's defaults: ``input_size`` (3, h, w),
            ``crop_pct``, ``interpolation``, ``mean``, ``std``.
        model_args: arguments of ``timm.create_model`` that differ from the architecture's defaults.

    Returns:
        The folder.

    Raises:
        ValueError: if the number of names differs from the model's number of outputs.
    """
    import timm

    saved: Any = copy.deepcopy(model).to(memory_format=torch.contiguous_format).half()
    if len(label_names) != saved.num_classes:
        raise ValueError(f"{len(label_names)} label names for a classifier with {saved.num_classes} outputs")
    saved.pretrained_cfg = {
        **{key: value for key, value in saved.pretrained_cfg.items() if key != "label_names"},
        **(data_config or {}),
        "num_classes": saved.num_classes,
    }
    timm.models.save_for_hf(
        saved,
        os.fspath(folder),
        model_config={"label_names": list(label_names), "multi_label": multi_label},
        model_args=dict(model_args) if model_args else None,
        safe_serialization=True,
    )
    return Path(folder)


_OF_FOLDERS = ("model.safetensors", "pytorch_model.bin")
"""Files of weights that come with a ``config.json``, which is missing where they are alone."""

_SAVE = "timm.models.push_to_hf_hub or tokenlearn.models.classifier.save_classifier"


def check_architecture(name: str, setting: str) -> None:
    """Refuse a name that timm does not have.

    Args:
        name: timm model, with or without the tag of its weights.
        setting: name of the setting, for the message.

    Raises:
        UserError: naming the nearest models.
    """
    import timm

    if timm.is_model(name.partition(".")[0]):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "give another, such as resnet10t"
    raise UserError(f"{setting} '{name}' is no model of timm; {hint}")


def _loaded(pretrained: str, architecture: str | None) -> tuple[Any, dict[str, Any]]:
    """The timm model that ``pretrained`` names, and the content of its ``config.json``; empty without one."""
    import timm

    if (file := _weights_file(pretrained)) is not None:
        weights = read_weights(file)
        architecture = architecture or weights.architecture
        if architecture is None:
            raise UserError(
                f"classifier '{pretrained}' is a file of weights, which does not say of what model; set architecture "
                f"to the timm model that it is of, or give a folder with its config.json, as {_SAVE} writes it"
            )
        check_architecture(architecture, "architecture")
        return build_classifier(weights, architecture, file), {}
    source = _source(pretrained)
    if architecture is not None:
        raise UserError(
            f"architecture '{architecture}' is for a file of weights, and classifier '{pretrained}' says its own; "
            "remove it"
        )
    try:
        return cast(Any, timm.create_model(source, pretrained=True)), _config(source)
    except Exception as error:  # a damaged folder can fail in any way
        raise UserError(_load_failure(pretrained, source, error)) from error


def _weights_file(pretrained: str) -> Path | None:
    """The file of weights that a name means: itself, or the only one of a folder without ``config.json``."""
    if pretrained.startswith("hf-hub:"):
        return None
    path = Path(resolve(pretrained.removeprefix("local-dir:"))).expanduser()
    if path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = [file for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES and not file.name.startswith(".")]
    return files[0] if len(files) == 1 and files[0].name not in _OF_FOLDERS else None


def _given_preprocessing(
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    input_size: Sequence[int] | int | None,
    crop_pct: float | None,
) -> dict[str, Any]:
    """The settings of preprocessing that are given, as timm has them."""
    given: dict[str, Any] = {}
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        if len(values) != 3:
            raise UserError(f"{name} has {len(values)} numbers, {list(values)}; give one for each of the 3 channels")
        given[name] = tuple(values)
    if input_size is not None:
        sides = [input_size] * 2 if isinstance(input_size, int) else list(input_size)
        sides = sides[1:] if len(sides) == 3 and sides[0] == 3 else sides  # timm has the channels first
        if len(sides) != 2 or min(sides) < 1:
            raise UserError(f"input_size must be height and width in pixels, such as [64, 64], got {input_size}")
        given["input_size"] = (3, *sides)
    if crop_pct is not None:
        if not 0 < crop_pct <= 1:
            raise UserError(f"crop_pct must be above 0 and at most 1, got {crop_pct}")
        given["crop_pct"] = crop_pct
    return given


def _source(pretrained: str) -> str:
    """The name by which timm loads ``pretrained``; UserError for a missing or incomplete folder or unknown name."""
    import timm

    prefix, _, rest = pretrained.partition(":")
    if prefix == "hf-hub":
        return pretrained
    folder = Path(resolve(rest if prefix == "local-dir" else pretrained)).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"classifier folder '{folder}' is incomplete: no 'config.json'; download it again, or write the model "
                f"with {_SAVE}"
            )
        _refuse_transformers(folder)
        if not any(file.suffix in (".safetensors", ".bin", ".pth") for file in folder.iterdir()):
            raise UserError(
                f"classifier folder '{folder}' is incomplete: no 'model.safetensors'; download or export it again"
            )
        return f"local-dir:{folder}"
    if prefix == "local-dir" or "/" in pretrained or "\\" in pretrained:
        raise UserError(
            f"classifier folder '{folder}' does not exist; give an existing folder, a timm model name or "
            "'hf-hub:owner/name' for a model on the hub"
        )
    if not timm.is_model(pretrained.partition(".")[0]):
        near = difflib.get_close_matches(pretrained, timm.list_models(pretrained=True), n=3)
        hint = (
            f"; did you mean {' or '.join(near)}?" if near else "; give a name from timm.list_pretrained() or a folder"
        )
        raise UserError(f"classifier '{pretrained}' is neither a folder nor a timm model{hint}")
    return pretrained


def _refuse_transformers(folder: Path) -> None:
    """Refuse the folder of a classifier of another library, whose config.json has no name of a timm architecture."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return  # timm says what is wrong
    if isinstance(config, dict) and "architecture" not in config and "architectures" in config:
        raise UserError(
            f"the classifier in '{folder}' is of the library transformers (architectures {config['architectures']}), "
            f"not of timm; give a timm model, by name or from a folder as {_SAVE} writes it"
        )


def _check_loaded(pretrained: str, model: Any) -> None:  # noqa: ANN401 - timm's models have no common type
    """Refuse a head that timm made anew because its size differs from the files', and inputs other than RGB."""
    stored = model.pretrained_cfg.get("num_classes")
    if stored is not None and stored != model.num_classes:
        raise UserError(
            f"classifier '{pretrained}' has {model.num_classes} outputs, but its files have {stored}, so its last "
            "layer would be random; correct num_classes and model_args in its config.json"
        )
    channels = next((part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d)), 3)
    if channels != 3:
        raise UserError(
            f"classifier '{pretrained}' takes images of {channels} channels, not the 3 of RGB; give another classifier"
        )


def _config(source: str) -> dict[str, Any]:
    """Content of the ``config.json`` of a folder or hub model; empty for timm model names."""
    prefix, _, rest = source.partition(":")
    if prefix == "hf-hub":
        from huggingface_hub import hf_hub_download

        owner_and_name, _, revision = rest.partition("@")
        file = Path(hf_hub_download(owner_and_name, "config.json", revision=revision or None))
    elif prefix == "local-dir":
        file = Path(rest) / "config.json"
    else:
        return {}
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def _load_failure(pretrained: str, source: str, error: Exception) -> str:
    reason = reason_of(error)
    if source.startswith("local-dir:"):
        return f"cannot load the classifier in '{pretrained}' ({reason}); download or export it again"
    if isinstance(error, OSError):
        return (
            f"cannot download classifier '{pretrained}' from the hub ({reason}); check the name and the network, or "
            "give a local folder"
        )
    return f"cannot load classifier '{pretrained}' ({reason}); give another timm model or a folder"


def _normalised(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _labels(
    model: Any,  # noqa: ANN401 - timm's models have no common type
    pretrained: str,
    given: Sequence[str] | Mapping[int, str] | None = None,
) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """Names of a model's outputs, and the outputs that each normalised name or synonym can mean."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    names: Any = model.pretrained_cfg.get("label_names")
    descriptions: Mapping[str, str] = model.pretrained_cfg.get("label_descriptions") or {}
    if names is None and (subset := infer_imagenet_subset(model)):
        imagenet: Any = ImageNetInfo(subset)
        names, descriptions = imagenet.label_names(), imagenet.label_descriptions(as_dict=True)
    if names is None:
        names = [str(index) for index in range(model.num_classes)]
    if given is not None:
        names, descriptions = _named(given, names, pretrained), {}
    if isinstance(names, Mapping):  # index to name, or name to index
        items = [(value, key) if isinstance(value, int) else (key, value) for key, value in names.items()]
        if not all(str(index).isdecimal() for index, _ in items):
            raise UserError(f"'label_names' of classifier '{pretrained}' is no list of names; correct its config.json")
        names = [name for _, name in sorted(items, key=lambda item: int(item[0]))]
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise UserError(f"'label_names' of classifier '{pretrained}' is no list of names; correct its config.json")
    aliases: defaultdict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        for alias in {_normalised(word) for word in (name, *descriptions.get(name, "").split(",")) if word}:
            aliases[alias].append(index)
    words = [descriptions.get(name, name).split(",")[0] for name in names]
    counts = Counter(words)  # ImageNet has two cranes
    labels = [word if counts[word] == 1 else f"{word} ({name})" for word, name in zip(words, names, strict=True)]
    return tuple(labels), dict(aliases)


def _named(given: Sequence[str] | Mapping[int, str], names: Any, pretrained: str) -> list[str]:  # noqa: ANN401
    """Label names with those of the settings in their places."""
    if not isinstance(given, Mapping):
        return list(given)
    replaced = list(names) if isinstance(names, Sequence) else [str(index) for index in range(len(names))]
    for index, name in given.items():
        if not 0 <= index < len(replaced):
            raise UserError(
                f"label_names has class {index}, and the {len(replaced)} classes of classifier '{pretrained}' are "
                "numbered from 0"
            )
        replaced[index] = name
    return replaced
