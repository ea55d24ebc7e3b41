"""``tokenlearn inspect`` and ``convert`` as they are typed, and that they start without torch."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.command_line import error_of
from tokenlearn.main import main
from tokenlearn.tokens.files import save_embedding

ROOT = Path(__file__).parents[1]
PIRATE = "checkpoints/class_tokens/pirate-tl.safetensors"
VECTORS = np.linspace(-1, 1, 768, dtype=np.float32)[None]


def test_inspect_says_what_a_file_is_and_what_to_type(capsys, tmp_path):
    main(["inspect", PIRATE])
    page = capsys.readouterr().out
    for words in (
        "<pirate>, 2 vectors",
        "checkpoints/portraits",
        "the vocabulary's",
        "embedding:pirate-tl pirate",
        "bandana",  # a word of the bundled vocabulary that shows a pirate
    ):
        assert words in page
    assert "may be a word" not in page
    shutil.copy(ROOT / "checkpoints/attribute_tokens/smile-tl.safetensors", tmp_path / "smile.safetensors")
    main(["inspect", str(tmp_path / "smile.safetensors")])
    assert "'smile' may be a word" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_neither_imports_torch(tmp_path, command):
    options = ["--output_dir", str(tmp_path)] if command == "convert" else []
    check = (
        f"import sys; from tokenlearn.main import main; main({[command, PIRATE, *options]!r}); "
        "print([name for name in ('torch', 'transformers', 'diffusers', 'lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


def test_convert_many_files_and_a_folder(tmp_path, capsys):
    save_file({"<a>": VECTORS, "<b>": VECTORS}, tmp_path / "two.safetensors")
    (tmp_path / "more").mkdir()
    save_file({"emp_params": VECTORS}, tmp_path / "more" / "c.safetensors")
    sources = [str(tmp_path / "two.safetensors"), str(tmp_path / "more")]
    main(["convert", *sources, "--to", "onetrainer", "--output_dir", str(tmp_path / "out")])
    paths = capsys.readouterr().out.split()
    assert [Path(path).name for path in paths] == [f"{name}-tl.safetensors" for name in "abc"]
    for path in paths:
        assert np.array_equal(load_file(path)["emp_params"], VECTORS)


def test_names_of_the_user(tmp_path, capsys):
    save_file({"emb_params": VECTORS}, tmp_path / "cat.safetensors")
    options = ["--output_dir", str(tmp_path / "out"), "--token", "mycat", "--name", "Tiger"]
    main(["convert", str(tmp_path / "cat.safetensors"), *options])
    captured = capsys.readouterr()
    assert captured.out.strip().endswith("Tiger.safetensors")
    assert "has capitals" in captured.err
    assert "may be a word" in captured.err
    assert "embedding:Tiger" in captured.err


def test_a_file_of_another_token_is_not_overwritten(tmp_path, capsys):
    save_file({"emb_params": VECTORS}, tmp_path / "cat.safetensors")
    save_embedding(tmp_path / "out" / "cat-tl.safetensors", "<another>", [VECTORS], {})
    error = error_of(["convert", str(tmp_path / "cat.safetensors"), "--output_dir", str(tmp_path / "out")], capsys)
    assert "<another>, not <cat>" in error
    assert "--name" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect"], "no files|--files|files"),
        (["inspect", "missing.pt"], "missing.pt"),
        (["convert", PIRATE, "--name", "a b"], "a b"),
        (["convert", PIRATE, "--tokens", "[<x>]"], "<x>"),
        (["convert", "checkpoints/class_tokens", "--token", "x"], "one token"),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys):
    assert any(word in error_of(arguments, capsys) for word in words.split("|"))
