"""Each program's rule of loading and of prompts, stated anew, on the files that are written here and read back.

The sources of the rules are in the table of ``tokenlearn/tokens/files/programs.py``.
"""

import json
import re
import unicodedata
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import load_file

from tokenlearn.tokens.files import EmbeddingFormat, load_embedding
from tokenlearn.tokens.files.base import EmbeddingFile
from tokenlearn.tokens.files.encoders import CLIP, ENCODERS
from tokenlearn.tokens.files.names import clip_pieces, default_stem, may_be_a_word, name_warnings
from tokenlearn.tokens.files.programs import what_to_type
from tokenlearn.tokens.files.writing import usage, write_tokens

SETS = [
    ("clip_l",),
    ("clip_h",),
    ("clip_l", "clip_g"),
    ("clip_l", "clip_g", "t5xxl"),
    ("clip_l", "t5xxl"),
    ("t5xxl",),
    ("mistral3_24b",),
    ("qwen3_4b",),
    ("qwen3_8b",),
    ("gemma",),
    ("qwen25_7b",),
]


def automatic1111(tensors):
    """One tensor, or both of XL whose widths sum to 2048; a T5 of one tensor loads and fits no model."""
    if {"clip_l", "clip_g"} == tensors.keys():
        return tensors if tensors["clip_l"].shape[1] + tensors["clip_g"].shape[1] == 2048 else None
    return {"clip": next(iter(tensors.values()))} if len(tensors) == 1 else None


def comfyui(encoders):
    """For each encoder its key; of a file without one, the first tensor, if its width fits."""

    def read(tensors):
        found = {}
        for name in encoders:
            key = ENCODERS[name].keys[0]
            tensor = tensors.get(key, next(iter(tensors.values())))
            if "ComfyUI" in ENCODERS[name].programs and tensor.shape[1] == ENCODERS[name].width:
                found[name] = tensor
        return found if len(found) == len(encoders) else None

    return read


def invokeai(tensors):
    if {"clip_l", "clip_g"} == tensors.keys():
        return tensors
    return tensors if tensors.keys() == {"emb_params"} and tensors["emb_params"].shape[1] in (768, 1024) else None


def kohya(tensors):
    if {"clip_l", "clip_g"} == tensors.keys():
        return tensors
    first = next(iter(tensors.values()))
    return {"clip": first} if len(tensors) == 1 and first.shape[1] in (768, 1024) else None


def onetrainer(encoders):
    def read(tensors):
        if len(encoders) == 1 and encoders[0] in CLIP:
            return tensors if "emp_params" in tensors else None
        keys = ["t5" if name == "t5xxl" else name for name in encoders]
        known = all("OneTrainer" in ENCODERS[name].programs for name in encoders)
        return {key: tensors[key] for key in keys} if known and all(key in tensors for key in keys) else None

    return read


def diffusers(encoders):
    """A single tensor, or by hand one for each encoder of a pipeline that has the loader."""

    def read(tensors):
        with_loader = [("clip_l",), ("clip_h",), ("clip_l", "clip_g"), ("clip_l", "t5xxl"), ("t5xxl",)]
        return tensors if encoders in with_loader else None

    return read


def rules(encoders):
    return {
        "diffusers": diffusers(encoders),
        "AUTOMATIC1111, Forge, SD.Next": automatic1111 if set(encoders) <= set(CLIP) else lambda tensors: None,
        "ComfyUI": comfyui(encoders),
        "InvokeAI": invokeai,
        "kohya gen_img": kohya,
        "stable-diffusion.cpp": kohya,
        "OneTrainer": onetrainer(encoders),
    }


def token_of(encoders, count=1, token="<pirate>", **metadata):
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal((count, ENCODERS[name].width)).astype(np.float32) for name in encoders]
    return EmbeddingFile(token, arrays, {"prompt": f"a {token} pirate", **metadata}, encoders=encoders)


@pytest.mark.parametrize("encoders", SETS, ids="+".join)
@pytest.mark.parametrize("format", get_args(EmbeddingFormat))
@pytest.mark.parametrize("count", [1, 4])
def test_programs_read_what_is_said_of_them(tmp_path: Path, encoders, format, count):
    file = token_of(encoders, count)
    (path,) = write_tokens([file], tmp_path, format)
    tensors = load_file(path)
    back = load_embedding(path)
    assert (back.token, back.encoders) == ("<pirate>", encoders)
    for found, expected in zip(back.arrays, file.arrays, strict=True):
        assert np.array_equal(found, expected)
    typed = what_to_type(back)
    for program, read in rules(encoders).items():
        given = read(tensors)
        assert (given is not None) == (program in typed), (program, typed)
        for vectors in (given or {}).values():
            assert any(np.array_equal(vectors, part) for part in file.arrays), program
    assert json.loads(back.metadata["usage"]) == typed


def clip_words(text):
    """CLIP's pattern: contractions, runs of letters, single numbers, runs of other signs."""
    letters = "".join(sorted({letter for letter in text if unicodedata.category(letter)[0] == "L"}))
    run = f"[{re.escape(letters)}]+" if letters else "(?!)"
    return re.findall(rf"'s|'t|'re|'ve|'m|'ll|'d|{run}|[0-9]|[^\s{re.escape(letters)}0-9]+", text.lower())


def replaced_in(prompt, name):
    """Places of a name's units in a prompt, as AUTOMATIC1111, kohya's gen_img and SD.Next look for them."""
    words, unit = clip_words(prompt), clip_words(name)
    return [start for start in range(len(words)) if words[start : start + len(unit)] == unit]


def test_what_is_typed_triggers_the_token_and_the_plain_word_does_not(tmp_path: Path):
    (path,) = write_tokens([token_of(("clip_l",))], tmp_path)
    typed, stem = what_to_type(load_embedding(path)), path.stem
    assert typed["tokenlearn"] == typed["diffusers"] == "a <pirate> pirate"
    for program in ("AUTOMATIC1111, Forge, SD.Next", "kohya gen_img"):
        assert replaced_in(typed[program], stem) == [1]  # once, and the class's name stays a word
    assert replaced_in("a portrait of a pirate, pirates", stem) == []
    assert typed["stable-diffusion.cpp"].count(stem) == 1
    assert stem not in "a pirate in piratetown"
    # ComfyUI takes the word after "embedding:", and cuts it at these signs.
    (word,) = [word for word in typed["ComfyUI"].split() if word.startswith("embedding:")]
    assert re.split(r"[<\[\s]", word.removeprefix("embedding:"))[0] == stem
    assert re.findall(r"<([a-zA-Z0-9., _-]+)>", typed["InvokeAI"]) == [stem]


@pytest.mark.parametrize("word", ["pirate", "hat", "king", "été", "7", "a", "don't", "!!", "人", "gray hair", "x_y"])
def test_no_default_name_can_be_a_unit_of_the_vocabulary(word):
    """A unit of CLIP's vocabulary is part of one piece of its pattern, and default names are several."""
    if not any(letter.isalnum() for letter in word):
        return
    stem = default_stem(f"<{word}>")
    assert len(clip_words(stem)) >= 3
    assert len(clip_pieces(stem)) >= 3
    assert not may_be_a_word(stem)
    assert default_stem(stem) == stem


def test_names_that_trouble_a_program_are_named():
    assert name_warnings("pirate-tl") == []
    assert "kohya and SD.Next fail" in name_warnings("pirate")[0]
    assert "ComfyUI" in name_warnings("Pirate-tl")[0]
    assert "InvokeAI" in name_warnings("pirät-tl")[0]


def test_a_name_of_other_letters_is_not_typed_in_invokeai(tmp_path: Path):
    file = token_of(("clip_l",))
    (path,) = write_tokens([file], tmp_path, name="pirät")
    assert "InvokeAI" not in what_to_type(load_embedding(path))
    assert any("InvokeAI" in line and "rename" in line for line in usage([file], [path], "a1111"))


@pytest.mark.parametrize("format", get_args(EmbeddingFormat))
def test_the_same_content_is_the_same_bytes(tmp_path: Path, format):
    metadata = {f"entry{index}": str(index) for index in range(9)}
    contents = set()
    for index in range(6):
        entries = dict(sorted(metadata.items(), reverse=bool(index % 2)))
        (path,) = write_tokens([token_of(("clip_l", "clip_g"), **entries)], tmp_path / str(index), format)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_what_programs_show_of_a_file(tmp_path: Path):
    about = {"class": "pirate", "method": "class_tokens", "base_model": "/home/me/models/mine"}
    about |= {"vocabulary_hash": "ab12", "judge": "owner/judge", "judged_accuracy": "0.9200"}
    (path,) = write_tokens([token_of(("clip_l",), **about)], tmp_path)
    entries = load_embedding(path).metadata
    assert entries["base_model"] == "mine"
    assert entries["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert entries["modelspec.trigger_phrase"] == "pirate-tl"
    assert "embedding:pirate-tl pirate" in entries["modelspec.usage_hint"]
    for words in ("'pirate'", "class tokens", "on mine (vocabulary ab12)", "judged accuracy 0.9200 by owner/judge"):
        assert words in entries["modelspec.description"]
    card = json.loads(path.with_suffix(".json").read_text())
    assert (card["activation text"], card["sd version"]) == ("a pirate-tl pirate", "SD1")
