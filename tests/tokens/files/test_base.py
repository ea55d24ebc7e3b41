from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenlearn.errors import UserError
from tokenlearn.tokens.files import EmbeddingFormat, embedding_file_name, load_embedding, save_embedding
from tokenlearn.tokens.files.safetensors_files import Array

VECTORS = torch.arange(6, dtype=torch.float32).reshape(2, 3)
WIDE = torch.arange(10, dtype=torch.float32).reshape(2, 5)


def keys_of(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return sorted(file.keys())


@pytest.mark.parametrize("format", get_args(EmbeddingFormat))
@pytest.mark.parametrize("vectors", [[VECTORS], [VECTORS[:1]], [VECTORS, WIDE]])
def test_round_trip_of_every_format(tmp_path: Path, format: EmbeddingFormat, vectors: list[Tensor]):
    path = save_embedding(tmp_path / "new" / "wizard.safetensors", "<wizard>", vectors, {"base_model": "tiny"}, format)
    loaded = load_embedding(path)
    assert loaded.token == "<wizard>"
    assert loaded.metadata == {"base_model": "tiny", "token": "<wizard>", "format": "pt"}
    assert all(torch.equal(a, b) for a, b in zip(loaded.vectors, vectors, strict=True))


@pytest.mark.parametrize(
    ("format", "key"),
    [
        ("a1111", "emb_params"),
        ("comfyui", "emb_params"),
        ("invokeai", "emb_params"),
        ("kohya", "emb_params"),
        ("diffusers", "<wizard>"),
        ("onetrainer", "emp_params"),
    ],
)
def test_key_of_every_format(tmp_path: Path, format: EmbeddingFormat, key: str):
    path = tmp_path / "wizard.safetensors"
    save_embedding(path, "<wizard>", [VECTORS], {}, format)
    assert keys_of(path) == [key]
    save_embedding(path, "<wizard>", [VECTORS, WIDE], {}, format)
    assert keys_of(path) == ["clip_g", "clip_l"]


def test_saves_rows_of_a_half_precision_parameter_scaled(tmp_path: Path):
    rows = nn.Parameter(VECTORS.repeat(2, 2).half())[1:3, ::2]
    loaded = load_embedding(save_embedding(tmp_path / "a.safetensors", "<a>", [rows, rows], {}, scale=1.5))
    assert loaded.vectors[0].dtype == torch.float32
    assert torch.equal(loaded.vectors[0], rows.detach().float() * 1.5)
    assert loaded.metadata["scale"] == "1.5"


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save_embedding(tmp_path / "wizard.safetensors", "<wizard>", [VECTORS], {})

    def half_written(file: Path, arrays: dict[str, Array], metadata: dict[str, str]) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("tokenlearn.tokens.files.base.write_arrays", half_written)
    with pytest.raises(UserError, match="no space"):
        save_embedding(path, "<wizard>", [VECTORS + 1], {})
    assert torch.equal(load_embedding(path).vectors[0], VECTORS)
    assert list(tmp_path.iterdir()) == [path]


def test_non_finite_vectors_are_not_saved_over_good_ones(tmp_path: Path):
    path = save_embedding(tmp_path / "wizard.safetensors", "<wizard>", [VECTORS], {})
    with pytest.raises(UserError, match=r"'<wizard>'.*wizard\.safetensors"):
        save_embedding(path, "<wizard>", [VECTORS / 0], {})
    assert torch.equal(load_embedding(path).vectors[0], VECTORS)


def test_other_suffix_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"'wizard\.safetensors'"):
        save_embedding(tmp_path / "wizard.pt", "<wizard>", [VECTORS], {})


@pytest.mark.parametrize(
    ("content", "token", "vectors"),
    [
        ({"emb_params": VECTORS}, "<my-style>", [VECTORS]),
        ({"emp_params": VECTORS}, "<my-style>", [VECTORS]),
        ({"<cat-toy>": VECTORS[1]}, "<cat-toy>", [VECTORS[1:]]),
        ({"clip_l": VECTORS}, "<my-style>", [VECTORS]),
        ({"clip_g": WIDE, "clip_l": VECTORS}, "<my-style>", [VECTORS, WIDE]),
        ({"emb_params": VECTORS.half()}, "<my-style>", [VECTORS]),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_foreign_forms(tmp_path: Path, suffix: str, content: dict[str, Tensor], token: str, vectors: list[Tensor]):
    path = tmp_path / f"my style{suffix}"
    if suffix == ".safetensors":
        save_file({key: tensor.clone() for key, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    loaded = load_embedding(path)
    assert loaded.token == token
    assert all(torch.equal(a, b) for a, b in zip(loaded.vectors, vectors, strict=True))
    assert load_embedding(path, token="<other>").token == "<other>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": VECTORS, "b": VECTORS}, "a, b"),
        ({"clip_l": VECTORS, "other": VECTORS}, "clip_l, other"),
        ({"clip_l": VECTORS, "clip_g": WIDE[:1]}, "2 for clip_l and 1 for clip_g"),
        ({"conv.weight": torch.zeros(2, 3, 1, 1)}, r"shape \(2, 3, 1, 1\)"),
        ({"emb_params": torch.zeros(0, 3)}, r"shape \(0, 3\)"),
        ({"emb_params": torch.zeros(2, 3, dtype=torch.int64)}, r"shape \(2, 3\).*'emb_params'"),
        ({"emb_params": torch.tensor([[1.0, float("nan")]])}, "finite"),
        ({}, r"a\.(safetensors|pt)"),
    ],
)
def test_unknown_content(tmp_path: Path, content: dict[str, Tensor], message: str):
    for path, write in ((tmp_path / "a.safetensors", save_file), (tmp_path / "a.pt", torch.save)):
        write({key: tensor.clone() for key, tensor in content.items()}, path)
        with pytest.raises(UserError, match=message) as caught:
            load_embedding(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("size", [0, 7, 40, -1])
def test_truncated_files(tmp_path: Path, suffix: str, size: int):
    path = tmp_path / f"a{suffix}"
    if suffix == ".pt":
        torch.save({"emb_params": VECTORS}, path)
    else:
        save_embedding(path, "<a>", [VECTORS], {})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=path.name) as caught:
        load_embedding(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_garbage(tmp_path: Path, name: str):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=name):
        load_embedding(tmp_path / name)


def test_missing_file_folder_and_unknown_suffix(tmp_path: Path):
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").touch()
    for name, message in (
        ("missing.pt", "missing.pt"),
        (".", str(tmp_path)),
        ("a.png", "without an embedding"),
        ("a.txt", r"\.safetensors"),
    ):
        with pytest.raises(UserError, match=message):
            load_embedding(tmp_path / name)


def test_file_that_cannot_name_its_token(tmp_path: Path):
    torch.save(VECTORS, tmp_path / "<>.pt")
    with pytest.raises(UserError, match="pass token="):
        load_embedding(tmp_path / "<>.pt")
    assert load_embedding(tmp_path / "<>.pt", token="<wizard>").token == "<wizard>"


@pytest.mark.parametrize(
    ("token", "name"),
    [
        ("<wizard>", "wizard-tl.safetensors"),
        ("<My Style>", "my-style-tl.safetensors"),
        ("[a]<b>", "a-b-tl.safetensors"),
        ("<cat-toy_2.1>", "cat-toy_2.1-tl.safetensors"),
        ("../../etc/<x>", "etc-x-tl.safetensors"),
    ],
)
def test_file_names(token: str, name: str):
    assert embedding_file_name(token) == name


def test_file_name_of_a_token_without_letters():
    with pytest.raises(UserError, match=r"<\*>"):
        embedding_file_name("<*>")
