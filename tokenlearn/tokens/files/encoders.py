"""Text encoders: the key of each in embedding files, and the programs that read it.

A file for several encoders has a tensor under the key of each. ComfyUI and OneTrainer name T5 differently, so files
have its vectors twice; both programs take the key that they know and leave the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Encoder:
    """A kind of text encoder.

    Attributes:
        name: name, which is its first key.
        keys: keys of its vectors in files; all of them are written, and the first that a file has is read.
        width: width of its input embedding.
        models: models that have it.
        programs: programs that read its vectors besides tokenlearn; none for encoders whose vectors no other reads.
    """

    name: str
    keys: tuple[str, ...]
    width: int
    models: str
    programs: tuple[str, ...]


_CLIP_PROGRAMS = ("diffusers", "AUTOMATIC1111", "ComfyUI", "InvokeAI", "kohya", "OneTrainer")

ENCODERS = {
    encoder.name: encoder
    for encoder in (
        Encoder("clip_l", ("clip_l",), 768, "Stable Diffusion 1, XL and 3, FLUX.1", _CLIP_PROGRAMS),
        Encoder("clip_g", ("clip_g",), 1280, "Stable Diffusion XL and 3", _CLIP_PROGRAMS),
        Encoder("clip_h", ("clip_h",), 1024, "Stable Diffusion 2", _CLIP_PROGRAMS),
        Encoder("t5xxl", ("t5xxl", "t5"), 4096, "Stable Diffusion 3, FLUX.1, Chroma", ("ComfyUI", "OneTrainer")),
        Encoder("mistral3_24b", ("mistral3_24b",), 5120, "FLUX.2 dev", ("ComfyUI",)),
        Encoder("qwen3_4b", ("qwen3_4b",), 2560, "FLUX.2 Klein 4B", ("ComfyUI",)),
        Encoder("qwen3_8b", ("qwen3_8b",), 4096, "FLUX.2 Klein 9B", ("ComfyUI",)),
        Encoder("llama", ("llama",), 4096, "HiDream", ("OneTrainer",)),
        Encoder("gemma", ("gemma",), 2304, "Sana", ("OneTrainer",)),
        Encoder("qwen25_7b", ("qwen25_7b",), 3584, "Qwen-Image", ()),
    )
}
"""By name, in the order of the encoders in models that have several."""

CLIP = ("clip_l", "clip_g", "clip_h")
UNREAD_MODELS = ("Qwen-Image", "Z-Image", "Wan", "Lumina 2")
"""Models for which no program but tokenlearn reads embeddings, though some have an encoder of the table."""

_BY_KEY = {key: encoder.name for encoder in ENCODERS.values() for key in encoder.keys}
_OF_SEVERAL = ("clip_l", "clip_g", "t5xxl")
_SINGLE = {768: "clip_l", 1024: "clip_h", 1280: "clip_g", 4096: "t5xxl", 2304: "gemma", 3584: "qwen25_7b"}
_SINGLE |= {5120: "mistral3_24b", 2560: "qwen3_4b"}


def encoder_of_key(key: str) -> str | None:
    """Name of the encoder that a key stands for, None for other keys."""
    return _BY_KEY.get(key)


def encoder_names(widths: Sequence[int]) -> tuple[str, ...]:
    """Encoders of a model whose file or task does not name them, by number and width.

    One of an unknown width, as in tiny models, is taken for CLIP-L. 4096 is taken for T5; files for Qwen 3 and Llama
    name it themselves.

    Args:
        widths: width of the input embedding of each encoder.

    Raises:
        ValueError: for more than three encoders.
    """
    if len(widths) > len(_OF_SEVERAL):
        raise ValueError(f"name the {len(widths)} text encoders of widths {list(widths)}")
    if len(widths) == 1:
        return (_SINGLE.get(widths[0], "clip_l"),)
    if len(widths) == 2 and widths[1] == ENCODERS["t5xxl"].width:
        return "clip_l", "t5xxl"
    return _OF_SEVERAL[: len(widths)]


def family_of(encoders: Sequence[str]) -> str:
    """Models that a token of these encoders is for, in words."""
    several = {
        ("clip_l", "clip_g"): "Stable Diffusion XL",
        ("clip_l", "clip_g", "t5xxl"): "Stable Diffusion 3",
        ("clip_l", "t5xxl"): "FLUX.1",
        ("clip_l", "clip_g", "t5xxl", "llama"): "HiDream",
        ("clip_l",): "Stable Diffusion 1",
    }
    return several.get(tuple(encoders)) or " and ".join(ENCODERS[name].models for name in encoders)
