import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenlearn.errors import UserError
from tokenlearn.tokens.files import load_embedding

VECTORS = torch.arange(6, dtype=torch.float32).reshape(2, 3)


@pytest.mark.parametrize("param", [VECTORS, nn.Parameter(VECTORS), VECTORS.half()])
@pytest.mark.parametrize("container", [dict, nn.ParameterDict])
@pytest.mark.parametrize("key", ["*", "sks"])
def test_automatic1111_pickle(tmp_path: Path, param: Tensor, container: type, key: str):
    content = {
        "string_to_token": {key: 265},
        "string_to_param": container({key: param}),
        "name": "charturner",
        "step": 500,
        "sd_checkpoint": None,
        "sd_checkpoint_name": "v1-5",
    }
    torch.save(content, tmp_path / "renamed.pt")
    loaded = load_embedding(tmp_path / "renamed.pt")
    assert loaded.token == "<renamed>"  # as AUTOMATIC1111 names it, whatever name is inside
    assert loaded.metadata == {"name": "charturner", "step": "500", "sd_checkpoint_name": "v1-5"}
    assert torch.equal(loaded.vectors[0], VECTORS)
    assert not loaded.vectors[0].requires_grad


def test_bare_tensor(tmp_path: Path):
    torch.save(VECTORS[0], tmp_path / "wizard.bin")
    loaded = load_embedding(tmp_path / "wizard.bin")
    assert loaded.token == "<wizard>"
    assert torch.equal(loaded.vectors[0], VECTORS[:1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", r"a\.pt"),
        ([VECTORS], r"a\.pt"),
        ({"emb_params": "text"}, "str.*'emb_params'"),
        ({"string_to_param": {}}, r"a\.pt"),
        ({"string_to_param": 3}, r"a\.pt"),
    ],
)
def test_pickles_without_tensors(tmp_path: Path, content: object, message: str):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=message):
        load_embedding(tmp_path / "a.pt")


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("legacy", [False, True])
def test_unsafe_pickle_is_not_run(tmp_path: Path, legacy: bool):
    trace = tmp_path / "was-run"
    content = {"emb_params": VECTORS, "extra": Malicious(trace)}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"a\.pt.*safetensors") as caught:
        load_embedding(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Malicious(trace), protocol=2))
    with pytest.raises(UserError):
        load_embedding(tmp_path / "plain.bin")
    assert not trace.exists()
