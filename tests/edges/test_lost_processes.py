"""Where one of several processes ends with its line, those that wait for it end with one line too."""

import subprocess
import sys

import pytest
import torch

from tokenlearn.main import _mistake

PROCESS = """
import sys
import torch.distributed as dist
from tokenlearn.main import _mistake

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
dist.barrier()
if dist.get_rank() == 1:
    sys.exit(2)
try:
    dist.barrier()
    dist.all_gather_object([None, None], "value")
except Exception as error:
    print(_mistake(error))
"""


def test_a_process_that_waits_for_one_that_has_ended(tmp_path):
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "meeting")]
    other = subprocess.Popen([*command, "1"])
    found = subprocess.run([*command, "0"], capture_output=True, text=True, check=True, timeout=300)
    assert other.wait(timeout=60) == 2
    (line,) = found.stdout.splitlines()
    assert line.startswith("another process of this run has ended while this one waited for it")
    assert "correct what that process says" in line


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (torch.distributed.DistNetworkError("The client socket has timed out"), True),
        (RuntimeError("[pair.cc:537] Connection closed by peer [127.0.0.1]:1234"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionResetError("Connection reset by peer"), False),
    ],
)
def test_errors_of_lost_processes(error, is_lost):
    assert (_mistake(error) is not None) == is_lost
