"""Kill runs at random moments and continue them: ``uv run python benchmarks/kill_and_resume.py``.

Each method runs at a small size on the bundled models, once undisturbed and then ``trials`` times with a kill: SIGKILL
and SIGTERM in turn, at a moment drawn evenly from the time that the undisturbed run took. A fit continues from its
``last.ckpt`` if it has one, in the same folder or, every other time, in a new one; predictions continue by the same
command. Compared are the embedding files and the name of the best checkpoint, or all images, latents and tables of
losses, to the bit.

Per method are counted: ``killed`` runs, those that ``finished`` before the signal, those that began ``anew`` because
there was no checkpoint yet, wrong exit codes of SIGTERM, and results that ``differ``.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import auto_cli
from safetensors.torch import load_file

_FIT: dict[str, Any] = {
    "trainer": {"max_steps": 12, "enable_progress_bar": False, "enable_model_summary": False},
    "last_checkpoint": {"every_n_minutes": 0},
}
_IMAGES = {"source": "portraits:60", "batch_size": 2, "batches_per_epoch": 3}
_PREDICT: dict[str, Any] = {"trainer": {"enable_progress_bar": False}}

METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "class_tokens": (
        "fit",
        "quickstart",
        _FIT
        | {
            "model": {
                "init_args": {
                    "judge": None,
                    "search": {"words": 8, "steps": 1},
                    "sampling": {"steps": 2},
                    "gradient": {"init_args": {"steps": 1}},
                }
            },
            "data": {"init_args": {"batch_size": 2, "batches_per_epoch": 3, "validation_images": 2}},
        },
    ),
    "caso": (
        "fit",
        "portraits/caso",
        _FIT
        | {
            "model": {
                "init_args": {
                    "judge": None,
                    "initialisation": {"words": 2, "collapse_batches": 1},
                    "sampling": {"steps": 2},
                }
            },
            "data": {"init_args": _IMAGES | {"held_out": {"validation": 2, "test": 1, "transfer": 1}}},
        },
    ),
    "textual_inversion": (
        "fit",
        "portraits/textual_inversion",
        _FIT
        | {
            "model": {"init_args": {"sampling": {"steps": 2}}},
            "data": {"init_args": _IMAGES | {"held_out": {"validation": 4, "test": 0}}},
        },
    ),
    "generate": (
        "predict",
        "portraits/generate",
        _PREDICT
        | {
            "model": {"init_args": {"sampling": {"steps": 4}}},
            "data": {
                "init_args": {
                    "prompts": ["a portrait of a <pirate> pirate"],
                    "seeds": list(range(12)),
                    "batch_size": 3,
                }
            },
        },
    ),
    "edit": (
        "predict",
        "portraits/edit",
        _PREDICT
        | {
            "model": {
                "init_args": {
                    "images": "configs/portraits/images/photographs",
                    "editing": {"steps": 5, "timestep": 601},
                }
            }
        },
    ),
    "sega": (
        "predict",
        "portraits/sega",
        _PREDICT | {"model": {"init_args": {"sampling": {"steps": 12}, "seeds": list(range(6)), "batch_size": 2}}},
    ),
}
"""Command, config and settings that make it small, of each method."""


@dataclass
class Counts:
    """Outcomes of the trials of a method."""

    killed: int = 0
    finished: int = 0
    anew: int = 0
    wrong_exit_codes: int = 0
    differ: int = 0


def kill_and_resume(methods: list[str] | None = None, trials: int = 4, seed: int = 0) -> dict[str, Any]:
    """Kill and continue runs of methods.

    Args:
        methods: names of methods; all by default.
        trials: killed runs of each.
        seed: seed of the moments.

    Returns:
        Method to its counts, and whether all results are the same as undisturbed.
    """
    moments = random.Random(seed)
    counts = {}
    for name in methods or METHODS:
        with tempfile.TemporaryDirectory() as folder:
            counts[name] = _trials(name, trials, Path(folder), moments)
        print(f"{name}: {json.dumps(asdict(counts[name]))}", file=sys.stderr, flush=True)
    same = all(count.differ == count.wrong_exit_codes == 0 for count in counts.values())
    return {name: asdict(count) for name, count in counts.items()} | {"all_same": same}


def _trials(name: str, trials: int, folder: Path, moments: random.Random) -> Counts:
    command, config, settings = METHODS[name]
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    program = [sys.executable, "-m", "tokenlearn", command, "--config", config, "--config", str(folder / "small.yaml")]

    def start(run: Path, *options: str) -> subprocess.Popen[bytes]:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*program, "--output_dir", str(run), *options], **quiet)  # type: ignore[call-overload,no-any-return]

    began = time.monotonic()
    if start(folder / "whole").wait() != 0:
        raise RuntimeError(f"the undisturbed run of {name} failed: {' '.join(program)}")
    duration = time.monotonic() - began
    expected, counts = _results(folder / "whole", command), Counts()
    for trial in range(trials):
        run, number = folder / f"run{trial}", (signal.SIGKILL, signal.SIGTERM)[trial % 2]
        process = start(run)
        try:
            process.wait(moments.uniform(0, duration))
            counts.finished += 1
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            counts.killed += 1
            # SIGTERM may come when nothing is left to stop, or before anything handles it.
            counts.wrong_exit_codes += process.wait() not in (0, -number, 128 + number)
        options, last = [], run / "checkpoints" / "last.ckpt"
        if command == "fit" and last.is_file():
            options = ["--ckpt_path", str(last)]
            run = folder / f"run{trial}-again" if trial % 4 >= 2 else run
        elif command == "fit":
            counts.anew += 1
        failed = start(run, *options).wait() != 0
        counts.differ += failed or _results(run, command) != expected
    return counts


def _results(run: Path, command: str) -> dict[str, Any]:
    """What a run leaves and must be the same."""
    if command == "fit":
        vectors = {
            path.name: {key: tensor.tolist() for key, tensor in load_file(path).items()}
            for path in sorted((run / "embeddings").glob("*.safetensors"))
        }
        return vectors | {"best": sorted(path.name for path in (run / "checkpoints").glob("best-*.ckpt"))}
    kinds = (".png", ".safetensors", ".csv")
    files = sorted(path for path in run.rglob("*") if path.suffix in kinds)
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


if __name__ == "__main__":
    print(json.dumps(auto_cli(kill_and_resume, as_positional=False), indent=2))
