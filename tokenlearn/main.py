"""The command line: ``tokenlearn fit | validate | test | predict | export``; nothing else knows about it."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import transformers
from jsonargparse import auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

# Imported so that configs may name their classes without a path.
import tokenlearn.data
import tokenlearn.methods
import tokenlearn.models  # noqa: F401
from tokenlearn.callbacks import EditWriter, EmbeddingExport, ImageGrid, PredictionWriter, ReportWriter
from tokenlearn.errors import UserError
from tokenlearn.export import export
from tokenlearn.files import atomic_write
from tokenlearn.methods import TokenTask

USER_ERROR = 2
"""Exit code for input that the user can correct."""


class TokenlearnCLI(LightningCLI):
    """Lightning's command line, with a run folder and this package's callbacks, each a section of the config."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--output_dir`` and the callbacks."""
        parser.add_argument(
            "--output_dir",
            type=str | None,
            default=None,
            help="Folder of this run; by default outputs/<config name>/<start time>.",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ImageGrid, "image_grid")
        parser.add_lightning_class_args(EmbeddingExport, "embedding_export")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(EditWriter, "edit_writer")
        parser.add_lightning_class_args(ReportWriter, "report")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/guided_accuracy",
                "checkpoint.mode": "max",
                "checkpoint.save_last": True,
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.filename": "best-step{step:06d}",
            }
        )

    def before_instantiate_classes(self) -> None:
        """Choose the run folder and have everything written there."""
        config = self.config[self.subcommand]
        run_folder = Path(config.output_dir or _default_run_folder(config))
        with atomic_write(run_folder / ".writable") as temporary:  # before models are loaded, not after training
            temporary.touch()
        (run_folder / ".writable").unlink()
        config.trainer.default_root_dir = str(run_folder)
        if config.trainer.logger in (None, True):
            config.trainer.logger = {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(run_folder), "name": "", "version": ""},
            }
        if self.subcommand == "predict" and config.return_predictions is None:
            config.return_predictions = False  # callbacks write them, and memory stays flat
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(run_folder / "checkpoints")

    def after_fit(self) -> None:
        """Have the tokens that were kept tested, or validated where that takes long, and say where everything is."""
        if self.trainer.interrupted:
            return
        tested = self.model.test_after_fit and getattr(self.model, "judge", None) is not None
        best = any(getattr(callback, "best_model_path", "") for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        run = self.trainer.test if tested else self.trainer.validate
        run(self.model, datamodule=self.datamodule, ckpt_path="best" if best else None, verbose=False)

    def _run_subcommand(self, subcommand: str) -> None:
        super()._run_subcommand(subcommand)
        _say_where(self.trainer.default_root_dir)


@rank_zero_only
def _say_where(run_folder: str) -> None:
    print(run_folder)


def _default_run_folder(config: Any) -> Path:  # noqa: ANN401 - jsonargparse's namespace
    files = config.get("config") or []
    name = Path(str(files[0])).stem if files else "run"
    return Path("outputs") / name / time.strftime("%Y-%m-%d_%H-%M-%S")


def main(args: ArgsType = None) -> None:
    """Run ``tokenlearn``.

    Args:
        args: command line without the program's name; None for the real one.

    Raises:
        SystemExit: with code 2 and one line on the error stream if the user can correct the input.
    """
    _quieten()
    arguments = sys.argv[1:] if args is None else args
    try:
        if isinstance(arguments, Sequence) and list(arguments[:1]) == ["export"]:
            auto_cli(export, args=[str(item) for item in arguments[1:]], prog="tokenlearn export", exit_on_error=False)
            return
        TokenlearnCLI(
            TokenTask,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "prog": "tokenlearn",
                "exit_on_error": False,
                "description": "Learn semantic tokens for frozen diffusion models. 'tokenlearn export --help' writes "
                "learned tokens as embedding files.",
            },
            args=args,
        )
    except Exception as error:
        found = _input_error(error)
        if found is None:
            raise
        print(f"tokenlearn: error: {' '.join(str(found).split())}", file=sys.stderr)
        raise SystemExit(USER_ERROR) from None


def _input_error(error: BaseException | None) -> BaseException | None:
    """The error that tells a user what to correct, if that is what went wrong.

    jsonargparse wraps what a constructor raises in errors of its own, so the causes are searched first.
    """
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for kinds in ((UserError,), (argparse.ArgumentError, MisconfigurationException)):
        for link in chain:
            if isinstance(link, kinds):
                return link
    return None


def _quieten() -> None:
    """Keep loading bars and advice that does not apply here out of the way of progress and results."""
    loud: tuple[Any, ...] = (diffusers.utils.logging, transformers.utils.logging)
    for library in loud:
        library.disable_progress_bar()
        library.set_verbosity_error()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)
    # Batches are prompts and seeds: there is nothing that workers could load ahead.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Only callbacks that ask for the places of samples in a data set need them.
    warnings.filterwarnings("ignore", message=".*infer the batch indices.*")
    # Lightning's own code, which users cannot change.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    # The frozen stack is in eval mode on purpose.
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode.*")


if __name__ == "__main__":
    main()
