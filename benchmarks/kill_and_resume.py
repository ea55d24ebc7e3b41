"""Kill runs at random moments and continue them: ``uv run python -m benchmarks.kill_and_resume``.

Each method runs on tiny models (:mod:`benchmarks.tiny_methods`), once undisturbed and then again and again with kills
by SIGKILL or SIGTERM from outside, until a number of runs have been killed. This process imports everything once and
starts each run as a copy of itself, which takes no time; ``--fork false`` starts a Python for each. Moments are drawn

- one in ten from all the time that the undisturbed run took, loading included,
- four in ten from the time after loading,
- five in ten from the 3 ms after a file was opened to be written, renamed or removed, one of all such events.

A fit continues from its ``last.ckpt`` if it has one, in the same folder or, every other time, in a new one. Others
continue by the same command. Continuations are killed as well, up to four times in a row.

After each kill, every file must be whole. SIGTERM must end with exit code 143, say how to continue, and name a
``last.ckpt`` of the step that it says. At the end all files must be those of the undisturbed run: of a fit the tokens,
the best checkpoint, weights, optimizer and schedule of the last one, sheets, tables and figures; of predictions every
image, latents file and table. Nothing else may lie in the folder or in that of temporary files, but for hidden files
of killed writers, which the next run removes an hour later.

A row of the printed table has a method and a signal with the number of runs ``killed``, of those that ``ended`` before
the signal, of continuations ``from`` a checkpoint or files and ``anew`` because there was none yet, and of results
that are ``equal`` of all. What is wrong is listed below it. Trials go to ``--results`` as they end, and a later call
goes on from there.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal, NamedTuple

import datasets  # type: ignore[import-untyped]
import torch
import yaml  # type: ignore[import-untyped]
from jsonargparse import auto_cli
from PIL import Image
from safetensors import safe_open

import tokenlearn.cli  # noqa: F401 - imported once for all runs
from benchmarks.tiny_methods import CACHE, TinyMethod, tiny_methods, write_tiny_files
from tokenlearn.callbacks.last_checkpoint import LAST
from tokenlearn.files import remove_leftovers
from tokenlearn.main import main

Signal = Literal["SIGKILL", "SIGTERM"]

_AFTER_EVENT = 0.003  # seconds
_IN_A_ROW = (1, 2, 4)  # kills of a trial
_MOST_TRIALS = 4  # times the number of kills, since runs may end before the signal
_HUNG = 300.0  # seconds
_LOGS = ("events.out.tfevents", "hparams.yaml")
"""Of another process: the times of a log, and the folder of the run."""
_NOT_BEGUN = -signal.SIGTERM
_END_OF_PNG = b"IEND\xaeB`\x82"


class Event(NamedTuple):
    """A file of the run that is about to be opened to be written, renamed or removed."""

    seconds: float
    name: str


class Moment(NamedTuple):
    """When to kill: so many seconds after the event of a number, or after the start."""

    seconds: float
    event: int | None = None


@dataclass
class Ended:
    """How a run ended.

    Attributes:
        code: exit code, negative for a signal.
        killed: whether the signal ended it.
        events: events on files.
        seconds: from the start to the end.
        log: what it printed.
    """

    code: int
    killed: bool
    events: list[Event]
    seconds: float
    log: str


@dataclass
class Trial:
    """A run that was killed, once or several times in a row, and continued to its end.

    Attributes:
        method, signal, number: what was tried.
        killed: how often it was killed.
        ended: kills that came too late.
        resumed: continuations from a checkpoint, or of predictions.
        anew: continuations of a fit that had no checkpoint yet.
        codes: exit codes.
        moments: when the signals were sent.
        wrong: what is wrong, empty if all results are the same.
    """

    method: str
    signal: Signal
    number: int
    killed: int = 0
    ended: int = 0
    resumed: int = 0
    anew: int = 0
    codes: list[int] = field(default_factory=list)
    moments: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def kill_and_resume(
    methods: list[str] | None = None,
    signals: list[Signal] = ["SIGKILL", "SIGTERM"],  # noqa: B006 - read only
    kills: int = 20,
    seed: int = 0,
    results: str | None = None,
    fork: bool = True,
    keep: bool = False,
) -> None:
    """Kill and continue runs of methods, and print the table of counts.

    Args:
        methods: names of methods, see :func:`benchmarks.tiny_methods.tiny_methods`; all by default.
        signals: SIGKILL, SIGTERM or both.
        kills: killed runs of each method and signal.
        seed: seed of the moments.
        results: file of finished trials, which are not made again; null for none.
        fork: start runs as copies of this process; false starts a Python for each, whose files have no events.
        keep: keep the folders of trials where something is wrong.
    """
    torch.set_num_threads(1)  # threads do not survive a fork
    base = Path(mkdtemp(prefix="kill-and-resume-"))
    bench = Bench(base, fork)
    known = _read(results)
    trials: list[Trial] = []
    try:
        bench.call(write_tiny_files, base / "tiny")
        found = tiny_methods(base / "tiny")
        for name in methods or found:
            whole: Whole | None = None
            for how in signals:
                done = [trial for trial in known if (trial.method, trial.signal) == (name, how)]
                while sum(trial.killed for trial in done) < kills and len(done) < _MOST_TRIALS * kills:
                    whole = whole or bench.undisturbed(found[name], name)
                    trial = bench.trial(found[name], whole, Trial(name, how, len(done)), seed)
                    done.append(trial)
                    if results is not None:
                        with open(results, "a") as file:
                            file.write(json.dumps(asdict(trial)) + "\n")
                    bench.clear(keep and bool(trial.wrong))
                trials += done
                print(_row(name, how, done), flush=True)
    finally:
        if not (keep and any(trial.wrong for trial in trials)):
            shutil.rmtree(base)
    print(f"\n{table(trials)}")


class Whole(NamedTuple):
    """The undisturbed run."""

    ended: Ended
    results: dict[str, str]
    loaded: float
    """Seconds until the config was written."""


class Bench:
    """Runs, and what they leave.

    Args:
        base: folder of everything.
        fork: see :func:`kill_and_resume`.
    """

    def __init__(self, base: Path, fork: bool) -> None:
        self.base, self.fork = base, fork
        self.temporary, self.runs = base / "temporary", base / "runs"
        for folder in (self.temporary, self.runs):
            folder.mkdir()

    def call(self, function: Any, *arguments: object) -> None:  # noqa: ANN401 - any function
        """Call a function in a copy of this process, so that this one stays without threads and pools."""
        child = os.fork()
        if not child:
            code = 1
            try:
                function(*arguments)
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        if os.waitpid(child, 0)[1]:
            raise RuntimeError(f"{function.__name__} failed")

    def undisturbed(self, method: TinyMethod, name: str) -> Whole:
        """Run to the end.

        Raises:
            RuntimeError: if it fails, or leaves temporary files.
        """
        run = self.base / "whole" / name
        self._clear_cache()
        ended = self._run(method, run)
        if ended.code:
            raise RuntimeError(f"the undisturbed run of {name} failed:\n{ended.log}")
        results = results_of(run)
        if wrong := [*self._left_over(run)]:
            raise RuntimeError(f"the undisturbed run of {name} leaves {', '.join(wrong)}")
        self.clear()
        configs = (event.seconds for event in ended.events if "config" in event.name)
        return Whole(ended, results, next(configs, 0.0))

    def trial(self, method: TinyMethod, whole: Whole, trial: Trial, seed: int) -> Trial:
        """Kill a run, perhaps kill its continuation, and continue it to the end."""
        chance = random.Random(f"{seed} {trial.method} {trial.signal} {trial.number}")
        self._clear_cache()
        number = signal.Signals[trial.signal]
        run, options = self.runs / f"{trial.signal}-{trial.number}", list[str]()
        kills = chance.choice(_IN_A_ROW)
        while True:
            moment = self._moment(chance, whole) if trial.killed < kills else None
            ended = self._run(method, run, options, moment, number)
            trial.codes.append(ended.code)
            if moment is not None:
                trial.killed += ended.killed
                trial.ended += not ended.killed
                trial.moments.append(f"{'start' if moment.event is None else moment.event}{moment.seconds:+.4f}")
            wrong = [*broken(run)]
            if ended.killed and number == signal.SIGTERM:
                wrong += _wrong_end(ended, method, run)
            elif not ended.killed and ended.code:
                wrong.append(f"exit code {ended.code}: {ended.log[-1500:]}")
            trial.wrong += wrong
            if not ended.killed:
                break
            if method.command == "predict":
                trial.resumed += 1
                continue
            last = run / "checkpoints" / LAST
            trial.resumed, trial.anew = trial.resumed + last.is_file(), trial.anew + (not last.is_file())
            if last.is_file() and trial.number % 2:
                run = run.with_name(f"{run.name}-again")
                options = ["--ckpt_path", str(last)]
            else:
                options = ["--ckpt_path", "last"]
        in_first_folder = "validation/step-" if "-again" in run.name else ""
        trial.wrong += differences(whole.results, results_of(run), in_first_folder)
        trial.wrong += self._left_over(run)
        return trial

    def _moment(self, chance: random.Random, whole: Whole) -> Moment:
        kind = chance.random()
        if kind < 0.1 or not self.fork:
            return Moment(chance.uniform(0, whole.ended.seconds))
        events = whole.ended.events
        if kind < 0.5:  # from the event before it, since runs are faster or slower
            seconds = chance.uniform(whole.loaded, whole.ended.seconds)
            before = max(index for index, event in enumerate(events) if event.seconds <= seconds)
            return Moment(seconds - events[before].seconds, before)
        return Moment(chance.uniform(0, _AFTER_EVENT), chance.randrange(len(events)))

    def _run(
        self,
        method: TinyMethod,
        run: Path,
        options: Sequence[str] = (),
        moment: Moment | None = None,
        number: signal.Signals = signal.SIGKILL,
    ) -> Ended:
        config, log = method.write(self.base / "config.yaml"), self.base / "log.txt"
        arguments = [method.command, "--config", str(config), "--output_dir", str(run), *options]
        began = time.monotonic()
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            self._be_a_run(arguments, log, writer)
        os.close(writer)
        try:
            killed, events = self._watch(child, reader, began, moment, number)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        finally:
            os.close(reader)
        # A signal after the last thing that there was to do changes nothing.
        return Ended(code, killed and code != 0, events, time.monotonic() - began, log.read_text())

    def _be_a_run(self, arguments: list[str], log: Path, writer: int) -> None:
        """In the copy of this process: run the command line, and tell of files."""
        code: Any = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ["TMPDIR"] = str(self.temporary)
            os.environ["HF_DATASETS_CACHE"] = str(self.base / "datasets")
            if not self.fork:
                os.execv(sys.executable, [sys.executable, "-m", "tokenlearn", *arguments])
            datasets.config.HF_DATASETS_CACHE = str(self.base / "datasets")
            _tell_of_files(writer, str(self.base))
            main(arguments)
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _watch(
        self, child: int, reader: int, began: float, moment: Moment | None, number: signal.Signals
    ) -> tuple[bool, list[Event]]:
        """Read events until the run has ended, and send the signal at its moment."""
        events: list[Event] = []
        due = began + moment.seconds if moment is not None and moment.event is None else None
        open_, text, sent = True, b"", False
        while open_:
            wait = _HUNG if due is None else max(0.0, due - time.monotonic())
            ready, _, _ = select.select([reader], [], [], wait)
            if not ready:
                if due is None:
                    os.kill(child, signal.SIGKILL)
                    raise RuntimeError(f"a run hangs; it printed:\n{(self.base / 'log.txt').read_text()}")
                os.kill(child, number)
                due, sent = None, True
                continue
            read = os.read(reader, 1 << 16)
            open_ = bool(read)
            *lines, text = (text + read).split(b"\n")
            for line in lines:
                events.append(Event(time.monotonic() - began, line.decode()))
                if moment is None or sent or due is not None:
                    continue
                if len(events) - 1 == moment.event:
                    due = time.monotonic() + moment.seconds
        return sent, events

    def _left_over(self, run: Path) -> Iterator[str]:
        """Temporary files that no later run would remove, in the folders of the run and of temporary files."""
        old = time.time() - 7200
        for folder in (run, self.temporary):
            for path in folder.rglob("*"):
                os.utime(path, (old, old))
        remove_leftovers(run)
        yield from (f"left over: {path.relative_to(run)}" for path in run.rglob(".*"))
        yield from (f"left over: {path.name} in the folder of temporary files" for path in self.temporary.rglob("*"))

    def _clear_cache(self) -> None:
        shutil.rmtree(self.base / "tiny" / CACHE, ignore_errors=True)

    def clear(self, keep: bool = False) -> None:
        """Make room for the next trial."""
        if not keep:
            for folder in (self.temporary, self.runs):
                shutil.rmtree(folder)
                folder.mkdir()


def _tell_of_files(writer: int, below: str) -> None:
    """Write a line for each event on a file, as Python's audit hooks tell of it."""

    def tell(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            changes = any(letter in mode for letter in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
        elif event in ("os.rename", "os.remove"):
            path, changes = arguments[0], True
        else:
            return
        if changes and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(below):
            os.write(writer, f"{event} {os.fspath(path).replace(os.linesep, ' ')}\n".encode())

    sys.addaudithook(tell)


def results_of(run: Path) -> dict[str, str]:
    """Everything that a run leaves and must be the same: file to the hash of what counts in it."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_file() and path.name[0] != "." and not path.name.startswith(_LOGS):
            found[name] = sha256(_content(path)).hexdigest()
    return found


def _content(path: Path) -> bytes:
    if path.suffix == ".ckpt":
        state = torch.load(path, weights_only=True)
        kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "tokenlearn")
        best = [
            [float(callback["best_model_score"]), Path(callback["best_model_path"]).name]
            for name, callback in state["callbacks"].items()
            if "ModelCheckpoint" in name and callback["best_model_score"] is not None
        ]
        return repr([_plain({name: state[name] for name in kept if name in state}), best]).encode()
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:  # its bytes have the entries of the header in random order
            tensors = {name: _plain(file.get_tensor(name)) for name in sorted(file.keys())}
            return repr([tensors, sorted((file.metadata() or {}).items())]).encode()
    if path.name == "summary.json":
        figures = json.loads(path.read_text())
        figures.pop("minutes", None)
        figures["embeddings"] = [Path(file).name for file in figures.get("embeddings", ())]
        return json.dumps(figures).encode()
    return path.read_bytes()


def _plain(value: Any) -> Any:  # noqa: ANN401 - any state
    """A state with bytes in place of tensors."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.detach().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {name: _plain(element) for name, element in value.items()}
    return [_plain(element) for element in value] if isinstance(value, list | tuple) else value


def differences(expected: dict[str, str], found: dict[str, str], may_miss: str = "") -> list[str]:
    """Files that differ; those whose names begin with ``may_miss`` may be missing, unless it is empty."""
    missing = [name for name in expected if name not in found and not (may_miss and name.startswith(may_miss))]
    return [
        *(f"missing: {name}" for name in missing),
        *(f"not expected: {name}" for name in found if name not in expected),
        *(f"differs: {name}" for name in expected if name in found and expected[name] != found[name]),
    ]


def broken(run: Path) -> Iterator[str]:
    """Files of a killed run that are not whole."""
    for path in run.rglob("*"):
        if not path.is_file() or path.name[0] == "." or path.name.startswith(_LOGS[0]):
            continue
        try:
            with _as_it_should_be(path):
                pass
        except Exception as error:
            yield f"broken: {path.relative_to(run)} ({type(error).__name__}: {error})"


@contextmanager
def _as_it_should_be(path: Path) -> Iterator[None]:
    """Read a file whole."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
        if not path.read_bytes().endswith(_END_OF_PNG):
            raise ValueError("the last chunk is cut")
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as tensors:
            [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118 - it is no dictionary
    elif path.suffix == ".ckpt":
        torch.load(path, weights_only=True)
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".yaml":
        yaml.safe_load(path.read_text())
    elif path.suffix == ".csv" and not path.read_text().endswith("\n"):
        raise ValueError("the last line is cut")
    yield


def _wrong_end(ended: Ended, method: TinyMethod, run: Path) -> Iterator[str]:
    """What is wrong with the end of a run that got SIGTERM."""
    begun, at_once = "loading ..." in ended.log, ("after step 0", "had not begun", "; the same command begins from ")
    lines = [line for line in ended.log.splitlines() if line.startswith("tokenlearn: stopped by SIGTERM: ")]
    if ended.code == _NOT_BEGUN and (not begun or str(run) in ended.log.splitlines()[-1:]):
        return  # nothing handled the signal yet, or nothing any more
    if ended.code != 143:
        yield f"exit code {ended.code} after SIGTERM: {ended.log[-1500:]}"
    elif len(lines) != 1:
        yield f"{len(lines)} lines about SIGTERM: {ended.log[-1500:]}"
    elif "continue from step " in lines[0]:
        step, path = lines[0].split("continue from step ")[1].split(" ")[0], lines[0].split("--ckpt_path ")[1]
        found = torch.load(path, weights_only=True)["global_step"] if Path(path).is_file() else None
        if found != int(step):
            yield f"{LAST} is of step {found}, not of step {step}"
    elif method.command == "fit" and not any(words in lines[0] for words in at_once):
        yield f"no {LAST}: {lines[0]}"


def _read(results: str | None) -> list[Trial]:
    if results is None or not Path(results).is_file():
        return []
    return [Trial(**json.loads(line)) for line in Path(results).read_text().splitlines()]


_COLUMNS = ("method", "signal", "killed", "ended", "from", "anew", "equal")


def _row(method: str, how: str, trials: Sequence[Trial]) -> str:
    killed, ended, resumed, anew = (
        sum(getattr(trial, name) for trial in trials) for name in ("killed", "ended", "resumed", "anew")
    )
    equal = f"{sum(not trial.wrong for trial in trials)} of {len(trials)}"
    return f"| {method} | {how} | {killed} | {ended} | {resumed} | {anew} | {equal} |"


def table(trials: Sequence[Trial]) -> str:
    """The counts as Markdown, then what is wrong."""
    rows = dict.fromkeys((trial.method, trial.signal) for trial in trials)
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{' --- |' * len(_COLUMNS)}"]
    lines += [_row(*row, [trial for trial in trials if (trial.method, trial.signal) == row]) for row in rows]
    return "\n".join([*lines, *_list_of_wrong(trials)])


def _list_of_wrong(trials: Iterable[Trial]) -> Iterator[str]:
    for trial in trials:
        if trial.wrong:
            yield f"{trial.method}, {trial.signal} {trial.number}, at {trial.moments}, codes {trial.codes}:"
            yield from (f"  {line}" for line in trial.wrong)


if __name__ == "__main__":
    auto_cli(kill_and_resume, as_positional=False)
