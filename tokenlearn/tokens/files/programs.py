"""Programs: which files each reads, and what is typed in its prompts.

Their rules, from their code (versions and places as they were read):

============================== ====================================================================================
program                        rule
============================== ====================================================================================
diffusers 0.42                 ``load_textual_inversion``: a file of one tensor, the key or ``token=`` is the token;
                               with several encoders one tensor at a time, for SD 1, 2, XL, FLUX.1 and Chroma
                               (``loaders/textual_inversion.py``)
AUTOMATIC1111 1.10, Forge,     one tensor under any key, or ``clip_l`` with ``clip_g``; the file's name is replaced
SD.Next                        wherever its ids stand (``modules/textual_inversion/textual_inversion.py``)
ComfyUI                        ``clip_l`` and so on, else the first tensor; ``embedding:`` and the file's name
                               (``comfy/sd1_clip.py``)
InvokeAI                       ``emb_params``, or ``clip_l`` with ``clip_g``; ``<``, the file's name of ASCII letters,
                               digits and ``., _-``, ``>`` (``backend/model_manager/configs/textual_inversion.py``)
kohya sd-scripts               ``gen_img.py``: the first tensor, or ``clip_l`` with ``clip_g``; the file's name, which
                               must be several units of the vocabulary
stable-diffusion.cpp           tensors by their width; the file's name, also inside of words (``conditioner.hpp``)
OneTrainer                     ``emp_params``, or a key for each encoder, with ``t5`` for T5; the token is a setting
============================== ====================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tokenlearn.tokens.files.base import EmbeddingFile
from tokenlearn.tokens.files.encoders import CLIP, ENCODERS, family_of
from tokenlearn.tokens.files.images import SUFFIXES as IMAGES

_XL = ("clip_l", "clip_g")
_INVOKEAI_NAME = re.compile(r"[a-zA-Z0-9._-]+")  # spaces and commas too, which other programs do not take


@dataclass(frozen=True)
class Program:
    """A program that reads embedding files.

    Attributes:
        name: name, or names of programs of one rule.
        reads: whether it reads a file.
        trigger: what stands for the token in prompts; ``{name}`` is the file's name, ``{token}`` the token.
        before: what is done before, with the same fields; empty if the file in the program's folder is enough.
        way_out: what to do about a file of Stable Diffusion that it does not read.
    """

    name: str
    reads: Callable[[EmbeddingFile], bool]
    trigger: str
    before: str = ""
    way_out: str = ""


def _is_image(file: EmbeddingFile) -> bool:
    return file.path is not None and file.path.suffix.lower() in IMAGES


def _one_clip(file: EmbeddingFile) -> bool:
    """Whether a file is one tensor for CLIP."""
    return len(file.encoders) == 1 and file.encoders[0] in CLIP and len(file.stored) <= 1


def _one_or_xl(file: EmbeddingFile) -> bool:
    return not _is_image(file) and (_one_clip(file) or (file.encoders == _XL and file.stored <= set(_XL)))


def _automatic1111(file: EmbeddingFile) -> bool:
    return _one_clip(file) or _one_or_xl(file)


def _diffusers(file: EmbeddingFile) -> bool:
    several = (_XL, ("clip_l", "t5xxl"), ("t5xxl",))
    return not _is_image(file) and (_one_clip(file) or file.encoders in several)


def _comfyui(file: EmbeddingFile) -> bool:
    known = all("ComfyUI" in ENCODERS[name].programs for name in file.encoders)
    bundled = any(key.startswith("bundle_emb.") for key in file.stored)
    named = file.stored <= {key for name in file.encoders for key in ENCODERS[name].keys}
    return not _is_image(file) and known and (_one_clip(file) or named or bundled)


def _invokeai(file: EmbeddingFile) -> bool:
    return _one_or_xl(file) and (file.encoders == _XL or file.stored == {"emb_params"})


def _onetrainer(file: EmbeddingFile) -> bool:
    if file.path is None or file.path.suffix != ".safetensors":
        return False
    known = {key.removesuffix("_out") for key in file.stored}
    if len(file.encoders) == 1 and file.encoders[0] in CLIP:
        return known == {"emp_params"}
    keys = {"t5" if name == "t5xxl" else name for name in file.encoders}
    return all("OneTrainer" in ENCODERS[name].programs for name in file.encoders) and keys <= known


PROGRAMS = (
    Program(
        "diffusers",
        _diffusers,
        "{token}",
        'after pipe.load_textual_inversion("{file}", token="{token}")',
        "convert it",
    ),
    Program("AUTOMATIC1111, Forge, SD.Next", _automatic1111, "{name}", "", "convert it with --to a1111"),
    Program("ComfyUI", _comfyui, "embedding:{name}", "", "convert it with --to comfyui"),
    Program("InvokeAI", _invokeai, "<{name}>", "", "convert it with --to invokeai"),
    Program("kohya gen_img", _one_or_xl, "{name}", "", "convert it with --to kohya"),
    Program("stable-diffusion.cpp", _one_or_xl, "{name}", "", "convert it"),
    Program(
        "OneTrainer", _onetrainer, "{token}", "as the placeholder in its settings", "convert it with --to onetrainer"
    ),
)


def what_to_type(file: EmbeddingFile) -> dict[str, str]:
    """What to type into the prompts of each program that reads a file, with the file's name as it is.

    The prompt is that of the file's metadata, or the token alone.

    Args:
        file: token of a file, with its path.

    Returns:
        Name of the program to the text of its prompts; for tokenlearn first.
    """
    found = {"tokenlearn": _prompt(file, file.token)}
    if file.space == "output_place":
        return {"OneTrainer": _prompt(file, file.token)}
    if file.space != "input" or file.path is None:
        return found
    name = file.path.stem
    for program in PROGRAMS:
        if not program.reads(file) or (program.name == "InvokeAI" and not _INVOKEAI_NAME.fullmatch(name)):
            continue
        found[program.name] = _prompt(file, program.trigger.format(name=name, token=file.token))
    return found


def how_to_use(file: EmbeddingFile) -> list[str]:
    """A line for each program: what to type, or why it does not read the file."""
    typed = what_to_type(file)
    path = file.path
    lines = [f"{'tokenlearn':<30} {typed['tokenlearn']}"] if "tokenlearn" in typed else []
    for program in PROGRAMS:
        if program.name in typed and path is not None:
            before = program.before.format(name=path.stem, token=file.token, file=path.name)
            if program.name == "diffusers" and len(file.encoders) > 1:
                before = f"after one load_textual_inversion for each of {', '.join(file.encoders)}"
            lines.append(f"{program.name:<30} {typed[program.name]:<40} {before}".rstrip())
        else:
            lines.append(f"{program.name:<30} - {_why_not(file, program)}")
    return lines


def _why_not(file: EmbeddingFile, program: Program) -> str:
    if file.space != "input":
        return "has no tokens of the text encoder's output"
    if program.name == "InvokeAI" and program.reads(file):
        return "takes names of ASCII letters, digits and ._- alone; rename the file"
    if all(name in CLIP for name in file.encoders):
        return f"does not read this form; {program.way_out}"
    return f"has no embeddings for {family_of(file.encoders)}"


def _prompt(file: EmbeddingFile, trigger: str) -> str:
    prompt = file.metadata.get("prompt", file.token)
    return prompt.replace(file.token, trigger) if file.token in prompt else trigger
