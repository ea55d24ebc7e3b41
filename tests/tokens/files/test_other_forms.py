"""Forms that other programs and scripts write: several encoders or tokens, bundles, images, old pickles."""

import base64
import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file
from torch import nn

from tokenlearn.errors import UserError
from tokenlearn.tokens import load_bank, load_embedding, read_tokens
from tokenlearn.tokens.files import save_embedding

L, G, T5 = (np.arange(2 * width, dtype=np.float32).reshape(2, width) for width in (3, 5, 7))


def assert_is(file, token, *arrays):
    assert file.token == token
    assert len(file.arrays) == len(arrays)
    for found, expected in zip(file.arrays, arrays, strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("content", "encoders", "arrays"),
    [
        ({"text_encoders_0": L, "text_encoders_1": G}, ("clip_l", "clip_g"), [L, G]),
        ({"clip_l": L, "clip_g": G, "t5xxl": T5}, ("clip_l", "clip_g", "t5xxl"), [L, G, T5]),
        ({"clip_l": L, "t5": T5}, ("clip_l", "t5xxl"), [L, T5]),
        ({"t5": T5, "t5xxl": T5}, ("t5xxl",), [T5]),
        ({"qwen3_8b": T5}, ("qwen3_8b",), [T5]),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pti"])
def test_a_key_for_each_encoder(tmp_path: Path, content, encoders, arrays, suffix):
    save_file(content, tmp_path / f"cat{suffix}")
    file = load_embedding(tmp_path / f"cat{suffix}")
    assert_is(file, "<cat>", *arrays)
    assert file.encoders == encoders


@pytest.mark.parametrize("end", [".safetensors", "-steps-500.bin"])
def test_two_files_of_the_trainer_of_diffusers_are_one_token(tmp_path: Path, end):
    paths = [tmp_path / f"learned_embeds{number}{end}" for number in ("", "_2")]
    for path, array in zip(paths, (L, G), strict=True):
        if end.endswith("bin"):
            torch.save({"<xl>": torch.from_numpy(array)}, path)
        else:
            save_file({"<xl>": array}, path)
    for given in (paths[0], paths[1]):
        assert_is(load_embedding(given), "<xl>", L, G)
    for setting in (str(tmp_path), [str(path) for path in paths]):
        assert load_bank(setting, [3, 5])[0].placeholders == ("<xl>",)


def test_one_file_of_the_trainer_names_its_token_by_its_key(tmp_path: Path):
    save_file({"sks": L}, tmp_path / "learned_embeds.safetensors")
    save_file({"sks": L}, tmp_path / "mine.safetensors")
    assert load_embedding(tmp_path / "learned_embeds.safetensors").token == "<sks>"
    assert load_embedding(tmp_path / "mine.safetensors").token == "<mine>"


def test_bundles_of_a_lora_file(tmp_path: Path):
    path = tmp_path / "lora.safetensors"
    layers = {f"lora_unet_{index}.weight": np.zeros((2, 2), np.float32) for index in range(100)}
    bundles = {"bundle_emb.cat.string_to_param.*": L, "bundle_emb.dog.v2.clip_l": L, "bundle_emb.dog.v2.clip_g": G}
    save_file(layers | bundles, path)
    cat, dog = read_tokens(path)
    assert_is(cat, "<cat>", L)
    assert_is(dog, "<dog.v2>", L, G)
    with pytest.raises(UserError, match=r"2 tokens .*tokenlearn convert"):
        load_embedding(path)


def test_several_tokens_in_a_file(tmp_path: Path):
    save_file({"<a>": L, "<b>": G}, tmp_path / "two.safetensors")
    torch.save({"string_to_param": {"one": torch.from_numpy(L), "other": torch.from_numpy(G)}}, tmp_path / "two.pt")
    assert [file.token for file in read_tokens(tmp_path / "two.safetensors")] == ["<a>", "<b>"]
    first, second = read_tokens(tmp_path / "two.pt")
    assert_is(first, "<one>", L)
    assert_is(second, "<other>", G)


def test_vectors_of_the_output_of_onetrainer(tmp_path: Path):
    save_file({"emp_params_out": L}, tmp_path / "cat.safetensors")
    save_file({"emp_params_out": L, "emp_params": L}, tmp_path / "both.safetensors")
    file = load_embedding(tmp_path / "cat.safetensors")
    assert_is(file, "<cat>", L)
    assert file.space == "output_place"
    with pytest.raises(UserError, match="only OneTrainer"):
        load_bank(str(tmp_path / "cat.safetensors"), [3])
    assert load_embedding(tmp_path / "both.safetensors").ignored == ("emp_params_out",)
    with pytest.warns(UserWarning, match="emp_params_out"):
        load_bank(str(tmp_path / "both.safetensors"), [3])
    copy = save_embedding(tmp_path / "copy.safetensors", "<cat>", file.arrays, {}, "onetrainer", space=file.space)
    assert load_embedding(copy).space == "output_place"


@pytest.mark.parametrize("legacy", [False, True])
def test_parameter_dicts_of_old_torch(tmp_path: Path, legacy: bool):
    """Of 1.11 and before, in both forms of files; the older form has the class's source text too."""
    params = nn.ParameterDict({"*": nn.Parameter(torch.from_numpy(L))})
    vars(params).pop("_keys")
    vars(params)["_parameters"] = {"*": nn.Parameter(torch.from_numpy(L))}
    content = {"string_to_token": {"*": 265}, "string_to_param": params, "name": "other"}
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=not legacy)
    assert_is(load_embedding(tmp_path / "old.pt"), "<old>", L)
    if legacy:
        assert b"class ParameterDict" in (tmp_path / "old.pt").read_bytes()


def test_modules_of_the_older_form_are_refused(tmp_path: Path):
    """What the source text is taken from is judged as ever: another class than ParameterDict is not loaded."""
    torch.save({"emb_params": nn.Linear(3, 2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"could run code and was not loaded; ask for a \.safetensors file"):
        load_embedding(tmp_path / "old.pt")


def training_as_json():
    param = {"TORCHTENSOR": L.tolist()}
    return json.dumps({"string_to_param": {"*": param}, "name": "inner", "step": 7}).encode()


def masked(nibbles):
    """Nibbles (H, W, 3) under AUTOMATIC1111's mask."""
    state, mask = 0, []
    for _ in range(nibbles.size):
        state = (1664525 * state + 1013904223) % 2**32
        mask.append(state % 255 & 15)
    return nibbles ^ np.array(mask, np.uint8).reshape(nibbles.shape)


def with_hidden_data(data, height=16):
    """An image with data in blocks beside a picture; upper bits are style, and keep pixels from being black."""
    packed = np.frombuffer(zlib.compress(data), np.uint8)
    packed = np.resize(packed, -(-len(packed) // (3 * height)) * 3 * height).reshape(height, -1, 3)
    low, high = (0x80 | masked(part) for part in (packed & 15, packed >> 4))
    gap, picture = np.zeros((height, 1, 3), np.uint8), np.full((height, 8, 3), 0x55, np.uint8)
    return Image.fromarray(np.concatenate([low, gap, picture, gap, high], axis=1))


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_data_hidden_in_an_image(tmp_path: Path, suffix):
    with_hidden_data(training_as_json()).save(tmp_path / f"cat{suffix}", lossless=True)
    file = load_embedding(tmp_path / f"cat{suffix}")
    assert_is(file, "<cat>", L)
    assert file.metadata["step"] == "7"


def test_an_embedding_in_the_text_of_an_image(tmp_path: Path):
    info = PngImagePlugin.PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(training_as_json()).decode())
    Image.new("RGB", (4, 4)).save(tmp_path / "cat.png", pnginfo=info)
    assert_is(load_embedding(tmp_path / "cat.png"), "<cat>", L)


def test_images_without_an_embedding_are_one_line(tmp_path: Path):
    for name, image in {
        "black": Image.new("RGB", (9, 9)),
        "plain": Image.new("RGB", (9, 9), (1, 2, 3)),
        "noise": with_hidden_data(b"{}"),
        "list": with_hidden_data(b"[1]"),
        "deep": with_hidden_data(b"[" * 100_000),
    }.items():
        image.save(tmp_path / f"{name}.png")
        with pytest.raises(UserError, match="without an embedding") as caught:
            load_embedding(tmp_path / f"{name}.png")
        assert "\n" not in str(caught.value)


def test_names_given_to_files_are_wrapped(tmp_path: Path):
    save_file({"emb_params": L}, tmp_path / "x.safetensors")
    assert load_bank({"mycat": str(tmp_path / "x.safetensors")}, [3])[0].placeholders == ("<mycat>",)


def test_half_precision_of_both_kinds(tmp_path: Path):
    bfloat = torch.from_numpy(L).bfloat16()
    buffer = io.BytesIO()
    torch.save({"emb_params": bfloat}, buffer)
    (tmp_path / "b.pt").write_bytes(buffer.getvalue())
    from safetensors.torch import save_file as save_tensors

    save_tensors({"emb_params": bfloat}, tmp_path / "b.safetensors")
    for suffix in (".pt", ".safetensors"):
        assert_is(load_embedding(tmp_path / f"b{suffix}"), "<b>", L)
