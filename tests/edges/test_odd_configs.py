"""Config files of odd YAML, sizes that no image has, and too little memory: one line each."""

import pytest
import torch

from tokenlearn.configs import combine_configs, given_settings
from tokenlearn.errors import UserError
from tokenlearn.main import _mistake
from tokenlearn.pipeline import Sampling

GOOD = "model:\n  class_path: Generate\n  init_args: {}\n"
TEN = "[" + ", ".join(["x"] * 10) + "]"
ODD = {
    "empty": "",
    "a comment": "# nothing",
    "null": "null",
    "a list": "- a\n- b",
    "a number": "3",
    "text": "words",
    "a cycle": "model: &a {x: *a}",
    "a cycle of lists": "model: &a [*a]",
    "a long cycle": "model: &a {x: {y: {z: [*a]}}}",
    "merged into itself": "model: &m\n  x: 1\n  y: {<<: *m, z: *m}\n",
    "tabs": "model:\n\tclass_path: Generate",
    "a tag of Python": "model: !!python/object/apply:os.mkdir ['evil']",
    "an unknown tag": "model: !thing {a: 1}",
    "two documents": f"{GOOD}---\n{GOOD}",
    "zeros": b"model\0: 3",
    "another encoding": "model: é".encode("latin-1"),
    "two bytes a letter": GOOD.encode("utf-16"),
    "another version": f"%YAML 9.9\n---\n{GOOD}",
    "aliases of aliases": f"a: &a {TEN}\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)),
    "deep": "model: " + "[" * 3000 + "]" * 3000,
    "numbers as names": "1: 2\nmodel: {}",
    "numbers as settings": "model: {3: 4}",
    "null as a name": "null: 3",
    "a truth value as a name": "model: {yes: 3}",
    "a date as a name": "model: {2020-01-01: 3}",
    "a list as a name": "? [a, b]\n: 3",
    "an unknown alias": "model: *nope",
    "half a quote": "model: 'Generate",
    "braces": "model: {class_path: Generate",
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("name", list(ODD))
def test_odd_files_are_one_line(tmp_path, name):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content if isinstance(content := ODD[name], bytes) else content.encode())
    with pytest.raises(UserError, match=r"config file '.*odd\.yaml'") as caught:
        combine_configs(["--config", str(path)])
    assert str(caught.value).isprintable()
    assert ";" in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("content", [GOOD, "\ufeff" + GOOD, GOOD + "data: &d {a: 1}\ntrainer: *d\n"])
def test_files_that_are_right(tmp_path, content):
    (tmp_path / "right.yaml").write_text(content)
    options, name = combine_configs(["--config", str(tmp_path / "right.yaml")])
    assert given_settings(options)["model"] == {"class_path": "Generate", "init_args": {}}
    assert name == "right"


@pytest.mark.parametrize("size", [(0, 0), (0, 16), (-16, 16)])
def test_sizes_without_pixels(size):
    with pytest.raises(UserError, match=r"sampling\.size must be at least 1"):
        Sampling(size=size)


def test_too_little_memory_is_one_line():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    for error in (caught.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert "lower the batch size or model.sampling.size" in str(_mistake(error))
    assert "on the GPU" in str(_mistake(torch.OutOfMemoryError("CUDA out of memory")))
    assert _mistake(RuntimeError("another")) is None
