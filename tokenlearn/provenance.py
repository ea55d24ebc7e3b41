"""Where an image comes from, in the text chunks of its PNG file: enough to make it again.

The chunk ``parameters`` is the text that AUTOMATIC1111 writes and other programs read. The chunk ``tokenlearn`` is a
JSON object with everything else; ``key`` in it is the same for two files of one name only if nothing that they are
made of differs. Tensors and tables have the key alone.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open

from tokenlearn.data.latent_cache import json_hash
from tokenlearn.errors import UserError
from tokenlearn.pipeline import Sampling
from tokenlearn.tokens import TokenBank

CHUNK = "tokenlearn"
A1111_CHUNK = "parameters"

_A1111_SAMPLERS = {
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "DPMSolverSDEScheduler": "DPM++ SDE",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "KDPM2DiscreteScheduler": "DPM2",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}
"""Its names of diffusers' schedulers, where these differ by more than the word Scheduler."""

_LARGEST_BATCH = 4096
_NOT_OF_ONE_IMAGE = ("images", "prompts", "seeds", "batch_size", "embeddings")
"""Settings of a task that say which images are made; the tokens of ``embeddings`` count by their vectors."""


@dataclass(frozen=True)
class Origin:
    """What all images of a run are made with.

    Attributes:
        config: sections of the run's config; empty outside the command line.
        tokens: placeholder to the hash of its vectors.
        sampling: settings of the sampler.
        model: the frozen model's name.
        scheduler: class of the scheduler or solver.
        vocabulary: fingerprint of the model's vocabulary.
    """

    config: Mapping[str, Any]
    tokens: Mapping[str, str]
    sampling: Sampling
    model: str
    scheduler: str
    vocabulary: str
    settings: str = field(init=False)
    """Hash of everything above that changes images."""

    def __post_init__(self) -> None:
        model = self.config.get("model") or {}
        init_args = model.get("init_args") or {}
        counted = {name: value for name, value in init_args.items() if name not in _NOT_OF_ONE_IMAGE}
        precision = (self.config.get("trainer") or {}).get("precision")
        task = [model.get("class_path"), counted, precision]
        sampling = [self.sampling.steps, self.sampling.negative_prompt, self.sampling.size, self.scheduler]
        rule = [type(self.sampling.rule).__name__, self.guidance_scale]
        counts = [task, sampling, rule, self.model, self.vocabulary, dict(self.tokens)]
        object.__setattr__(self, "settings", json_hash(counts))

    def key(self, source: str) -> str:
        """Hash of the settings, a hyphen, and the hash of what one image is made from.

        Args:
            source: the prompt and seed, or the content of the image that is edited.
        """
        return f"{self.settings}-{json_hash(source)}"

    def png_info(
        self,
        key: str,
        *,
        prompt: str | None = None,
        seed: int | None = None,
        size: tuple[int, int] | None = None,
        image: str | None = None,
        batch_size: int = 1,
        note: str = "",
    ) -> PngInfo:
        """Text chunks of an image.

        Args:
            key: see :meth:`key`.
            prompt: prompt of a generated image, None for an edited photo and for sheets.
            seed: its seed.
            size: its width and height.
            image: path of an edited photo.
            batch_size: images that were computed together; other numbers round differently.
            note: what was done to a generated image.
        """
        about = {
            "version": _package_version(),
            "key": key,
            "prompt": prompt,
            "seed": seed,
            "image": image,
            "batch_size": batch_size,
            "tokens": dict(self.tokens),
            "model": self.model,
            "scheduler": self.scheduler,
            "steps": self.sampling.steps,
            "guidance_scale": self.guidance_scale,
            "config": dict(self.config),
        }
        info = PngInfo()
        if prompt is not None and seed is not None and size is not None:
            info.add_text(A1111_CHUNK, self.parameters(prompt, seed, size, note))
        info.add_text(CHUNK, json.dumps(about, default=str))
        return info

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance; 1 for a rule without one."""
        return float(getattr(self.sampling.rule, "guidance_scale", 1.0))

    def parameters(self, prompt: str, seed: int, size: tuple[int, int], note: str = "") -> str:
        """The text of AUTOMATIC1111's chunk: prompt, negative prompt, and a line of settings."""
        name = Path(self.model).name
        used = [(token.strip("<>"), hash_) for token, hash_ in self.tokens.items() if token in prompt]
        settings = {
            "Steps": self.sampling.steps,
            "Sampler": _A1111_SAMPLERS.get(self.scheduler, self.scheduler.removesuffix("Scheduler")),
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": seed,
            "Size": f"{size[0]}x{size[1]}",
            "Model": _quoted(name),
        }
        if used:
            settings["TI hashes"] = _quoted(", ".join(f"{token}: {hash_}" for token, hash_ in used))
        if note:
            settings["tokenlearn edit"] = _quoted(note)
        settings["Version"] = f"tokenlearn {_package_version()}"
        negative = self.sampling.negative_prompt
        lines = [prompt, *([f"Negative prompt: {negative}"] if negative else [])]
        return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in settings.items())])


def token_hashes(bank: TokenBank | None) -> dict[str, str]:
    """Placeholder to the first 12 hexadecimal digits of the SHA-256 of its float32 vectors, of all text encoders."""
    if bank is None:
        return {}
    hashes: dict[str, str] = {}
    for placeholder in bank.placeholders:
        digest = hashlib.sha256()
        for vectors in bank.get(placeholder):
            digest.update(vectors.detach().float().cpu().contiguous().numpy().tobytes())
        hashes[placeholder] = digest.hexdigest()[:12]
    return hashes


def key_of_image(path: Path) -> str | None:
    """Key of an image file; None for a file that this package did not write, or that cannot be read."""
    try:
        with Image.open(path) as image:
            return str(json.loads(image.info[CHUNK])["key"])
    except (OSError, KeyError, ValueError, TypeError, SyntaxError):  # SyntaxError: Pillow's, for a broken PNG
        return None


def read_origin(path: str | Path) -> dict[str, Any]:
    """What an image of this package says about itself.

    Raises:
        UserError: if it is no PNG file, cannot be read, or says nothing.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"--from '{path}' does not exist; name a PNG file that 'tokenlearn predict' wrote")
    try:
        with Image.open(file) as image:
            form, info = image.format, dict(image.info)
    except (OSError, SyntaxError):
        raise UserError(f"--from '{path}' is not an image; name a PNG file that 'tokenlearn predict' wrote") from None
    if form != "PNG":
        raise UserError(f"--from '{path}' is a {form} file, which has no settings in it; give the PNG file itself")
    try:
        about: dict[str, Any] = json.loads(info[CHUNK])
        if not _is_whole(about):
            raise ValueError
        json.dumps(about, ensure_ascii=False).encode()  # halves of characters are in no config
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"--from '{path}' does not say how it was made; give a PNG file that 'tokenlearn predict' wrote, not a "
            "copy that another program saved"
        ) from None
    if about["prompt"] is None and about["image"] is None:
        raise UserError(f"--from '{path}' is a sheet of several images; give one of the images")
    return about


def _is_whole(about: Mapping[str, Any]) -> bool:
    """Whether what an image says about itself has all that makes it again, each of its kind, and nothing else.

    Anybody can write such a chunk, so that it must not name other sections of a config.
    """
    config = about["config"]
    sections = {"model": dict, "data": dict, "trainer": dict, "ckpt_path": str}
    settings = [config[name].get("init_args") or {} for name in ("model", "data") if name in config]
    return (
        all(isinstance(config[name], kind) for name, kind in sections.items() if name in config)
        and config.keys() <= sections.keys()
        and (config.get("trainer") or {}).keys() <= {"precision", "accelerator"}
        and isinstance(config["model"]["class_path"], str)
        and all(isinstance(found, dict) for found in settings)
        and isinstance(about["batch_size"], int)
        and 1 <= about["batch_size"] <= _LARGEST_BATCH
        and isinstance(about["tokens"], dict)
        and isinstance(about["prompt"], str | None)
        and isinstance(about["image"], str | None)
        and (about["prompt"] is None or (isinstance(about["seed"], int) and 0 <= about["seed"] < 2**63))
    )


def config_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """The config that makes an image again, from what the image says about itself.

    The image fills a batch of the size it was made in, because other sizes round differently.
    """
    config: dict[str, Any] = json.loads(json.dumps(about["config"]))
    count = about["batch_size"]
    settings = config["model"].setdefault("init_args", {})
    config.setdefault("trainer", {})["devices"] = 1  # several would share the batch
    if "data" in config:
        prompts = {"prompts": [about["prompt"]], "seeds": [about["seed"]] * count, "batch_size": count}
        config["data"]["init_args"] = (config["data"].get("init_args") or {}) | prompts
    elif about["image"] is not None:
        settings["images"] = about["image"]
    else:
        settings |= {"prompts": [about["prompt"]], "seeds": [about["seed"]] * count}
        if count > 1:
            settings["batch_size"] = count
    return config


def check_tokens_of(about: Mapping[str, Any], tokens: Mapping[str, str]) -> None:
    """Refuse to make an image again with other tokens.

    Raises:
        UserError: naming the tokens that differ.
    """
    wrong = [token for token, hash_ in about["tokens"].items() if tokens.get(token) != hash_]
    if wrong:
        raise UserError(
            f"the image was made with other vectors of {', '.join(wrong)} than those loaded; give its embedding "
            "files by --model.embeddings, or its checkpoint by --ckpt_path"
        )


def key_of_tensors(path: Path) -> str | None:
    """As :func:`key_of_image`, of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("key")
    except (OSError, SafetensorError):
        return None


def key_of_table(path: Path) -> str | None:
    """As :func:`key_of_image`, of a CSV file whose rows have a column ``key``."""
    try:
        with path.open(newline="") as file:
            return next(csv.DictReader(file), {}).get("key")
    except (OSError, UnicodeDecodeError, csv.Error):
        return None


def key_of(path: Path) -> str | None:
    """Key of a file of any of the three kinds."""
    kinds = {".png": key_of_image, ".safetensors": key_of_tensors, ".csv": key_of_table}
    return kinds[path.suffix](path)


def _quoted(text: str) -> str:
    """AUTOMATIC1111 quotes values with a comma or a colon in JSON's way."""
    return json.dumps(text, ensure_ascii=False) if any(letter in text for letter in ',:\n"') else text


def _package_version() -> str:
    """Version of the package; of a checkout that runs without being installed, ``source``."""
    try:
        return version("tokenlearn-diffusion")
    except PackageNotFoundError:
        return "source"
