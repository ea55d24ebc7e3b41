"""Entry point of the command line: help, version and a first line of output before anything heavy is imported."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from tokenlearn.configs import combine_configs
from tokenlearn.errors import UserError, check_unicode, reason_of
from tokenlearn.stopping import Stopped, StopSignals

USER_ERROR = 2
"""Exit code for input that the user can correct."""

_COMES_FIRST = {"convert": "files", "inspect": "files", "classifier": "images"}
"""Commands to the setting whose value comes first, without an option: one value, or of ``files`` any number."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

COMMANDS = (
    "fit",
    "validate",
    "test",
    "predict",
    "classifier",
    "compare",
    "directions",
    "calibrate",
    "export",
    "convert",
    "inspect",
    "page",
)

_FUNCTIONS = {
    "classifier": ("own_classifiers", "classifier"),
    "compare": ("evaluation.comparison", "compare"),
    "directions": ("direction_files", "directions"),
    "calibrate": ("calibration", "calibrate_file"),
    "export": ("export", "export"),
    "convert": ("conversion", "convert"),
    "inspect": ("inspection", "inspect"),
    "page": ("page.command", "page"),
}
"""Commands that need no trainer: module and name of the function that does each."""

HELP = """\
usage: tokenlearn COMMAND [--config NAME_OR_FILE]... [--setting VALUE]...

Learn semantic tokens for frozen text-to-image diffusion models, and edit and guide images with them.

commands:
  fit        learn tokens, evaluate them, and write their embedding files
               tokenlearn fit --config quickstart
  validate   validation figures and images of a checkpoint
               tokenlearn validate --config quickstart --ckpt_path outputs/quickstart/TIME/checkpoints/last.ckpt
  test       the table of an evaluation
               tokenlearn test --config portraits/caso --ckpt_path outputs/caso/TIME/checkpoints/last.ckpt
  predict    generate, edit or optimise images
               tokenlearn predict --config portraits/sega
               tokenlearn predict --from outputs/sega/TIME/images/all/000-a-portrait-of-a-person-seed1.png
  classifier a guide and a judge from your own labelled images, in folders by class or a CSV file
               tokenlearn classifier photos --output_dir classifiers
  compare    ways to draw classes in one table, judged, with their cost: prompts, tokens, guidance, searches
               tokenlearn compare --config comparisons/portraits
  directions tokens without training, from pairs of prompts
               tokenlearn directions --config directions/portraits
  calibrate  strengths of a token at which equal steps change images equally
               tokenlearn calibrate --file embeddings/smile-tl.safetensors --images photos --classifier FOLDER
  export     write learned tokens as embedding files for another program
               tokenlearn export --ckpt_path outputs/quickstart/TIME/checkpoints/last.ckpt --format diffusers
  convert    embedding files of any program, or folders of them, as files for another program
               tokenlearn convert EasyNegative.pt my-cat.safetensors --to diffusers
  inspect    what an embedding file holds, which programs read it, and what to type in each
               tokenlearn inspect checkpoints/class_tokens/pirate-tl.safetensors
  page       sliders for tokens and concepts in a browser, on this computer
               tokenlearn page

settings:
  --config names a YAML file or a config of this package, such as configs/quickstart.yaml. Several are combined:
  later ones override, and options override all of them.
    tokenlearn fit --config backbones/sd21 --config methods/class_token --trainer.max_steps 100
  List and explain settings:
    tokenlearn fit --help                          sections and the trainer's settings
    tokenlearn fit --model.help ClassTokens        settings of a task
    tokenlearn fit --data.help PromptDataModule    settings of data
    tokenlearn export --help
    tokenlearn fit --config quickstart --print_config    everything that a run would use

  -h, --help    show this page
  --version     show the version
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run ``tokenlearn``.

    Args:
        args: command line without the program's name; None for the real one.

    Raises:
        SystemExit: with one line on the error stream; with code 2 if the user can correct the input, with 128 and the
            number of the signal if Ctrl-C (130) or SIGTERM (143) stopped the run.
    """
    arguments = sys.argv[1:] if args is None else [str(argument) for argument in args]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if arguments[0] == "--version":
        print(f"tokenlearn {version('tokenlearn-diffusion')}")
        return
    try:
        with StopSignals() as signals:
            _run(arguments, signals)
    except Stopped as stopped:
        print(f"tokenlearn: {stopped.message}", file=sys.stderr)
        raise SystemExit(stopped.code) from None
    except Exception as error:
        found = _mistake(error)
        if found is None:
            raise
        print(f"tokenlearn: error: {' '.join(str(found).split())}", file=sys.stderr)
        raise SystemExit(USER_ERROR) from None


def _run(arguments: Sequence[str], signals: StopSignals) -> None:
    command, options = arguments[0], arguments[1:]
    if command not in COMMANDS:
        raise UserError(
            f"'{command}' is not a command; begin with one of {', '.join(COMMANDS)}, or see 'tokenlearn --help'"
        )
    for option in options:
        check_unicode(option, "option")
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the trainer starts this program once per device
        print(f"tokenlearn {command}: loading ...", file=sys.stderr, flush=True)
    if command in _FUNCTIONS:
        from jsonargparse import auto_cli

        module, name = _FUNCTIONS[command]
        arguments, _ = combine_configs(_first_by_name(command, options))
        function = getattr(import_module(f"tokenlearn.{module}"), name)
        auto_cli(function, args=arguments, as_positional=False, prog=f"tokenlearn {command}", exit_on_error=False)
    else:
        image, options = _image_to_make_again(command, options)
        arguments, name = combine_configs(options)
        from tokenlearn.cli import TokenlearnCLI

        if image is not None:
            from tokenlearn.provenance import config_of, read_origin

            origin = read_origin(image)
            arguments = ["--config", json.dumps(config_of(origin)), *arguments]
            TokenlearnCLI("again", [command, *arguments], signals, origin)
            return
        TokenlearnCLI(name, [command, *arguments], signals)


def _first_by_name(command: str, options: Sequence[str]) -> list[str]:
    """The options of a command, with what comes first without an option as an option too."""
    first = next((index for index, option in enumerate(options) if option.startswith("-")), len(options))
    if command not in _COMES_FIRST or not first:
        return list(options)
    name, values = _COMES_FIRST[command], options[:first]
    if name != "files" and len(values) > 1:
        raise UserError(f"'{command}' takes one folder or file, got {', '.join(values)}; name one")
    value = json.dumps(values) if name == "files" else values[0]
    return [f"--{name}", value, *options[first:]]


def _image_to_make_again(command: str, options: Sequence[str]) -> tuple[str | None, list[str]]:
    """The image of ``--from``, None without one, and the other options.

    Raises:
        UserError: if it is not an option of the command, or has no value.
    """
    rest, images = [], []
    remaining = iter(options)
    for option in remaining:
        flag, equals, value = option.partition("=")
        if flag != "--from":
            rest.append(option)
        else:
            images.append(value if equals else next(remaining, ""))
    if not images:
        return None, rest
    if command != "predict" or len(images) > 1 or not images[0]:
        raise UserError("--from makes one image again; use it as in 'tokenlearn predict --from image.png'")
    return images[0], rest


def _mistake(error: BaseException | None) -> BaseException | None:
    """The error that tells the user what to correct, if there is one among an error and its causes.

    jsonargparse wraps errors of constructors in errors of its own, so a UserError anywhere comes first.
    """
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")  # not imported, not raised
    misconfiguration: type[Exception] = getattr(lightning, "MisconfigurationException", UserError)
    full = next((link for link in chain if isinstance(link, OSError) and link.errno in _NO_ROOM), None)
    if full is not None:
        return UserError(f"{full.strerror}: '{full.filename or 'the output folder'}'; make room, or use another disk")
    for kinds in ((UserError,), (argparse.ArgumentError, misconfiguration)):
        for link in chain:
            if isinstance(link, kinds):
                return link
    readers = (_missing_package, _no_memory, _lost_process)
    return next((found for read in readers for found in map(read, chain) if found is not None), None)


def _lost_process(error: BaseException) -> UserError | None:
    """That another process of the run has ended, where this one waited for it: the other one says why."""
    # Of torch.distributed's own classes, and of gloo, whose errors are plain ones.
    lost = type(error).__name__.startswith("Dist") or re.search(r"\bgloo\b|closed by peer|reset by peer", str(error))
    if not isinstance(error, RuntimeError) or not lost:
        return None
    return UserError(
        f"another process of this run has ended while this one waited for it ({reason_of(error)}); correct what that "
        "process says, or give it more memory if it says nothing"
    )


def _no_memory(error: BaseException) -> UserError | None:
    """What takes less memory, if there was not enough: of the computer, or of a GPU."""
    of_gpu = type(error).__name__ == "OutOfMemoryError"  # torch's, which is imported only where it is used
    of_computer = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    if not isinstance(error, Exception) or not (of_gpu or of_computer):
        return None
    return UserError(
        f"there is not enough memory{' on the GPU' if of_gpu else ''}: {reason_of(error)}; lower the batch size or "
        "model.sampling.size, or see docs/memory.md"
    )


def _missing_package(error: BaseException) -> UserError | None:
    """What to install, if the error is that an optional package is not there."""
    if not isinstance(error, ImportError) or (error.name or "").partition(".")[0] == "tokenlearn":
        return None
    found = re.search(r"Requirement '([\w-]+)|requires the (\w+) library|No module named '(\w+)", str(error))
    if found is None:
        return None
    package = next(filter(None, found.groups()))
    return UserError(f"the package '{package}' is needed and not installed; run 'uv pip install {package}'")
