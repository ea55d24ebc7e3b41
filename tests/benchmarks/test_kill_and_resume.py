import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.kill_and_resume import Trial, broken, differences, results_of, table


@pytest.fixture
def run(tmp_path):
    """A run folder with a file of each kind."""
    state = {"state_dict": {"x": torch.ones(3)}, "global_step": 2, "callbacks": {}, "epoch": 1}
    torch.save(state, tmp_path / "last.ckpt")
    save_file({"x": torch.ones(200)}, tmp_path / "x.safetensors", metadata={"token": "<x>", "step": "1"})
    Image.effect_noise((64, 64), 50).save(tmp_path / "x.png")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    (tmp_path / "config.yaml").write_text("a: {b: 1}\n")
    (tmp_path / "summary.json").write_text('{"minutes": 1.0, "accuracy": 0.5}')
    return tmp_path


def test_cut_files_are_found(run):
    assert not list(broken(run))
    names = sorted(path.name for path in run.iterdir())
    for name in names:
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[:-2])
        assert [line.split()[1] for line in broken(run)] == [name]
        (run / name).write_bytes(content)


def test_every_difference_is_found(run):
    expected = results_of(run)
    (run / "summary.json").write_text('{"minutes": 2.0, "accuracy": 0.5}')
    (run / "events.out.tfevents.1").write_text("a log")
    assert not differences(expected, results_of(run))
    torch.save(torch.load(run / "last.ckpt") | {"state_dict": {"x": torch.ones(3).nextafter(torch.zeros(3))}},
               run / "last.ckpt")  # fmt: skip
    save_file({"x": torch.ones(200)}, run / "x.safetensors", metadata={"step": "2", "token": "<x>"})
    (run / "x.csv").write_text("a,b\n1,2\n1,2\n")
    (run / "x.png").rename(run / "y.png")
    assert differences(expected, results_of(run)) == [
        "missing: x.png",
        "not expected: y.png",
        "differs: last.ckpt",
        "differs: x.csv",
        "differs: x.safetensors",
    ]
    assert differences(expected, results_of(run), "x.")[0] == "not expected: y.png"


def test_the_table_counts_trials():
    trials = [
        Trial("edit", "SIGKILL", 0, killed=2, resumed=2),
        Trial("edit", "SIGKILL", 1, killed=1, ended=1, resumed=1, wrong=["differs: x.png"]),
    ]
    lines = table(trials).splitlines()
    assert lines[2] == "| edit | SIGKILL | 3 | 1 | 3 | 0 | 1 of 2 |"
    assert lines[-1] == "  differs: x.png"


def test_a_killed_run_continues():
    command = ["benchmarks.kill_and_resume", "--methods", "[generate]", "--signals", "[SIGKILL]", "--kills", "1"]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=True)
    cells = [cell.strip() for cell in done.stdout.splitlines()[-1].strip("|").split("|")]
    assert cells[:2] == ["generate", "SIGKILL"]
    assert int(cells[2]) >= 1
    done_of, of = cells[-1].split(" of ")
    assert done_of == of
