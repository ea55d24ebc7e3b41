"""The commands of the trainer, ``tokenlearn fit | validate | test | predict``, as a LightningCLI."""

from __future__ import annotations

import math
import re
import time
from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from string import Formatter
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden

# Imported so that configs may name their classes without a path.
import tokenlearn.data.generated
import tokenlearn.data.image_datamodule
import tokenlearn.data.prompts
import tokenlearn.diffusion.solvers
import tokenlearn.generation
import tokenlearn.guidance
import tokenlearn.models
import tokenlearn.objectives
import tokenlearn.training  # noqa: F401
from tokenlearn.callbacks import (
    EmbeddingExport,
    ImageGrid,
    LastCheckpoint,
    LearningCurve,
    PredictionWriter,
    ReportWriter,
    ResultWriter,
    RunConfig,
    RunLogger,
    RunProgress,
    StepGuard,
    WholeCheckpoints,
)
from tokenlearn.callbacks.last_checkpoint import LAST
from tokenlearn.callbacks.run_config import recorded, settings_hash
from tokenlearn.configs import asks_for_help, given_settings
from tokenlearn.errors import UserError, reason_of
from tokenlearn.evaluation import Evaluation, evaluates, evaluation_of
from tokenlearn.files import check_writable, new_folder, refuse_remote, remove_leftovers
from tokenlearn.notices import is_first_process, notice
from tokenlearn.quiet import quiet
from tokenlearn.run_checks import check_command
from tokenlearn.setting_checks import Section, check_settings, parser_line
from tokenlearn.setting_types import show
from tokenlearn.stopping import Stopped, StopSignals
from tokenlearn.token_task import OF_TASK, TokenTask
from tokenlearn.training.base import TokenTraining

SECTIONS = {
    "model": Section(L.LightningModule, named=True),
    "data": Section(L.LightningDataModule, named=True),
    "evaluation": Section(Evaluation, named=True),
    "trainer": Section(L.Trainer, named=False),
    "checkpoint": Section(ModelCheckpoint, named=False),
    "last_checkpoint": Section(LastCheckpoint, named=False),
    "image_grid": Section(ImageGrid, named=False),
    "embedding_export": Section(EmbeddingExport, named=False),
    "learning_curve": Section(LearningCurve, named=False),
    "predictions": Section(PredictionWriter, named=False),
    "results": Section(ResultWriter, named=False),
    "report": Section(ReportWriter, named=False),
}
"""Sections of the configuration; those without a class of their own are callbacks and the trainer."""


OTHER_SETTINGS: dict[str, Any] = {
    "seed_everything": bool | int,
    "output_dir": str | None,
    "ckpt_path": str | None,
    "weights_only": bool | None,
    "verbose": bool,
    "return_predictions": bool | None,
}
"""Settings outside of sections, with their types; each command has some of them."""


_NO_FIGURE = "Early stopping conditioned on metric"
"""How the error of EarlyStopping begins where no such figure is logged."""


class TokenlearnCLI(LightningCLI):
    """Lightning's command line with a run folder, an evaluation, and this package's callbacks as sections.

    Args:
        name: name of the run, which its folder is in.
        args: command line.
        signals: handler of signals that stop the run.
        origin: what the image that is made again says about itself; None for an ordinary run.

    Raises:
        Stopped: if a signal stopped the run.
    """

    def __init__(
        self, name: str, args: list[str], signals: StopSignals, origin: Mapping[str, Any] | None = None
    ) -> None:
        self.name, self.signals, self.origin = name, signals, origin
        super().__init__(
            L.LightningModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [StepGuard(signals)]},
            parser_kwargs={"prog": "tokenlearn", "exit_on_error": False},
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--output_dir``, ``--evaluation`` and the callbacks."""
        parser.add_argument(
            "--output_dir",
            type=str | None,
            default=None,
            help="Folder of this run; by default outputs/<config name>/<start time>.",
        )
        parser.add_subclass_arguments(Evaluation, "evaluation", required=False)
        for name, section in SECTIONS.items():
            if issubclass(section.base, L.Callback):
                parser.add_lightning_class_args(section.base, name)
        parser.set_defaults(
            {
                "trainer.enable_model_summary": False,  # of frozen models, with 0 FLOPs
                "checkpoint.monitor": OF_TASK,
                "checkpoint.mode": "max",
                "checkpoint.save_last": False,  # it would be the last best; LastCheckpoint writes the last
                "checkpoint.enable_version_counter": False,  # a resumed run finds the best files that it repeats
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.filename": "best-step{step:06d}",
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401 - Lightning's union
        """Parse, once the settings are known to be of the right names and types, and refuse what cannot be run.

        Lightning would warn that arguments were given in Python, but they are the command line's.
        """
        command, *options = args
        self._verbose_is_given = False
        if not asks_for_help(options):
            names = self._subcommand_parsers[command].get_defaults()
            given = given_settings(options)
            self._verbose_is_given = "verbose" in given
            check_settings(given, SECTIONS, {name: hint for name, hint in OTHER_SETTINGS.items() if name in names})
            if given.get("model") is None:
                raise UserError(
                    f"{command} has no model; give a config, as in 'tokenlearn {command} --config quickstart', or "
                    "name a task, as in '--model ClassTokens'"
                )
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise UserError(parser_line(str(error))) from error
        config = self.config[command]
        _expand_home(config.trainer)
        if command == "fit" and config.ckpt_path == "last":
            config.ckpt_path = _last_of(config.output_dir)
        check_command(command, config, evaluates)

    def instantiate_classes(self) -> None:
        """Check that the run folder can be written to, then make the task, the data and the trainer."""
        config = self.config[self.subcommand]
        if config.output_dir is not None:
            if not config.output_dir.strip():
                raise UserError("output_dir is empty; name a folder, such as outputs/mine, or leave it out")
            refuse_remote(config.output_dir)
            self.run_folder = Path(config.output_dir).expanduser()
        else:
            self.run_folder = Path("outputs", self.name, time.strftime("%Y-%m-%d_%H-%M-%S"))
            if is_first_process():
                self.run_folder = new_folder(self.run_folder)
        if is_first_process():
            check_writable(self.run_folder)  # before models are loaded, not after training
            remove_leftovers(self.run_folder)
        if self.subcommand == "fit":
            self._refuse_other_fit()
        if self.subcommand == "test" and not self._verbose_is_given:
            config.verbose = False  # the report has the same figures
        if self.subcommand == "predict" and config.return_predictions is None:
            config.return_predictions = False  # callbacks write them, and memory stays flat
        with quiet():
            super().instantiate_classes()
        self.evaluation: Evaluation[Any] | None = self._get(self.config_init, "evaluation")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:  # noqa: ANN401 - arguments of the trainer
        """Make the trainer, which writes everything to the run folder.

        The folder is given here and not in the config, so that a saved config.yaml is not tied to its run.
        """
        folder = str(self.run_folder)
        if self._get(self.config_init, "trainer").logger in (None, True):
            kwargs["logger"] = RunLogger(folder, name="", version="")
        settings = self._get(self.config_init, "trainer")
        own = _as_list(settings.callbacks)
        shown = settings.enable_progress_bar is not False and not settings.barebones
        if shown and not any(isinstance(callback, ProgressBar) for callback in own):
            kwargs["callbacks"] = [*own, RunProgress()]
        plugins = _as_list(settings.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeCheckpoints()]
        try:
            trainer = super().instantiate_trainer(default_root_dir=folder, **kwargs)
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            found = f"{reason_of(error)}{_named_in(str(error), settings)}"
            raise UserError(f"a setting below trainer is not possible: {found}; correct it") from error
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint):
                continue
            _check_filename(callback)
            callback.save_last = False  # configs from before LastCheckpoint have true
            if not callback.dirpath:
                callback.dirpath = f"{folder}/checkpoints"
            if isinstance(self.model, TokenTask):
                callback.monitor, callback.mode = self.model.watched(callback.monitor, callback.mode, "checkpoint")
                callback.kth_value = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
        return trainer

    def _refuse_other_fit(self) -> None:
        """Refuse to write into a folder with the checkpoints of a fit with other settings, unless it continues that.

        Raises:
            UserError: naming the folder.
        """
        config, folder = self.config[self.subcommand], self.run_folder / "checkpoints"
        own = config.ckpt_path is not None and Path(config.ckpt_path).resolve().parent == folder.resolve()
        if own or not any(folder.glob("*.ckpt")):
            return
        self._dump_config()
        if recorded(self.run_folder) != ("fit", settings_hash(self.config_dump)):
            raise UserError(
                f"output_dir '{self.run_folder}' has the checkpoints of a fit with other settings; give another "
                f"folder, or continue that fit with --ckpt_path {folder / LAST}"
            )

    def after_instantiate_classes(self) -> None:
        """Hand the hash of the settings to the tables."""
        self._dump_config()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined] # set by the trainer's connector
            if isinstance(callback, ReportWriter):
                callback.settings = settings_hash(self.config_dump)

    def before_fit(self) -> None:
        """Refuse an evaluation that does not suit the task before the fit, and log all settings."""
        if self.evaluation is not None:
            evaluation_of(self.model, self.evaluation)
        for logger in self.trainer.loggers:
            logger.log_hyperparams(self.config_dump)

    def before_test(self) -> None:
        """Test the evaluation of the task instead of the task."""
        self._say_what_is_not_trained()
        self.model = evaluation_of(self.model, self.evaluation)

    def before_validate(self) -> None:
        """Say what is not trained."""
        self._say_what_is_not_trained()

    def _say_what_is_not_trained(self) -> None:
        """Tokens of neither a checkpoint nor embedding files are at their start."""
        if (
            isinstance(self.model, TokenTraining)
            and not self.model.loaded
            and self._get(self.config, "ckpt_path") is None
        ):
            rank_zero_only(notice)(
                f"the tokens of this {self.subcommand} are not trained, but at their start; give those of a fit with "
                "--ckpt_path or model.tokens.initial_embeddings"
            )

    def before_predict(self) -> None:
        """Hand the settings to the callbacks that write images."""
        self._dump_config()
        sections = {name: self.config_dump.get(name) for name in ("model", "data", "ckpt_path")}
        config = {name: section for name, section in sections.items() if section is not None}
        accelerator = self.config_dump["trainer"]["accelerator"]
        config["trainer"] = {"precision": self.trainer.precision, "accelerator": accelerator}
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined] # set by the trainer's connector
            if isinstance(callback, PredictionWriter | ResultWriter):
                callback.config, callback.expected = config, self.origin

    def after_fit(self) -> None:
        """Evaluate the best tokens, or validate them where there is no quick evaluation, and say where they are."""
        if self.trainer.interrupted:
            return
        paths = [getattr(callback, "best_model_path", "") for callback in self.trainer.checkpoint_callbacks]
        best = next(filter(None, paths), None)
        evaluation = self._quick_evaluation()
        if evaluation is None and not is_overridden("validation_step", self.model):  # a task from outside the package
            return
        run = self.trainer.validate if evaluation is None else self.trainer.test
        run(evaluation or self.model, datamodule=self.datamodule, ckpt_path=best, verbose=False)

    def _quick_evaluation(self) -> Evaluation[Any] | None:
        """The evaluation, if the task has one that may follow every fit, and a judge for it."""
        if getattr(self.model, "judge", None) is None:
            return None
        try:
            evaluation = evaluation_of(self.model, self.evaluation)
        except UserError:  # a task from outside the package
            return None
        return evaluation if evaluation.evaluate_after_fit else None

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            with quiet():
                super()._run_subcommand(subcommand)
        except SystemExit:
            if self.signals.received is None:
                raise
            raise Stopped(self.signals.received, self._what_is_left()) from None
        except RuntimeError as error:
            if not str(error).startswith(_NO_FIGURE):
                raise
            figures = ", ".join(sorted(self.trainer.callback_metrics))
            raise UserError(f"{str(error).partition('.')[0]}; set its monitor to one of {figures}") from error
        _say_where(self.run_folder)

    def _what_is_left(self) -> str:
        """How far a stopped run came, and how to continue it."""
        if self.subcommand == "fit":
            steps, before = self.trainer.max_steps, self.config[self.subcommand].ckpt_path
            done = f"after step {self.trainer.global_step}{f' of {steps}' if steps >= 0 else ''}"
            for callback in self.trainer.checkpoint_callbacks:
                if isinstance(callback, LastCheckpoint) and callback.path is not None:
                    return (
                        f"{done}; continue from step {callback.step} by the same command with --ckpt_path "
                        f"{callback.path}"
                    )
            return f"{done}; the same command begins {'anew' if before is None else f'from {before} again'}"
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined] # set by the trainer's connector
            if isinstance(callback, PredictionWriter | ResultWriter) and (progress := callback.progress()) is not None:
                return (
                    f"{progress[0]} of {progress[1]} images are done; the same command with --output_dir "
                    f"{self.run_folder} makes the others"
                )
        return f"'{self.subcommand}' is not finished; the same command begins anew"


def _as_list(value: Any) -> list[Any]:  # noqa: ANN401 - any setting
    """One object, several or none, as a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _check_filename(callback: ModelCheckpoint) -> None:
    """Refuse names of checkpoints that lead out of their folder, or are no formats.

    Raises:
        UserError: naming the name.
    """
    filename = Path(callback.filename or "")
    try:
        list(Formatter().parse(str(filename)))
    except ValueError as error:
        raise UserError(
            f"checkpoint.filename '{filename}' has braces that are not those of a figure ({error}); write them as in "
            "'best-step{step:06d}'"
        ) from None
    if filename.is_absolute() or ".." in filename.parts:
        raise UserError(
            f"checkpoint.filename '{filename}' leads out of the folder of checkpoints; name the folder in "
            "checkpoint.dirpath"
        )


def _expand_home(settings: Any) -> None:  # noqa: ANN401 - jsonargparse's namespaces
    """Expand ``~`` in the paths of the trainer's loggers, profilers and callbacks, not all of which do."""
    items: Any = settings if isinstance(settings, list) else vars(settings)
    for key, value in enumerate(items) if isinstance(items, list) else items.items():
        if isinstance(value, str) and (value == "~" or value.startswith("~/")):
            items[key] = str(Path(value).expanduser())
        elif isinstance(value, list | Namespace):
            _expand_home(value)


def _named_in(reason: str, settings: Namespace) -> str:
    """The settings of the trainer that an error of it names, with their values."""
    given = {name: value for name, value in vars(settings).items() if value is not None}
    named = [name for name in given if re.search(rf"\b{name}\b", reason)]
    return f" (got {', '.join(f'{name}: {show(given[name])}' for name in named)})" if named else ""


def _last_of(output_dir: str | None) -> str | None:
    """The last checkpoint in a run folder; None if the fit has not got there yet.

    Raises:
        UserError: if no folder is given: a new one has none.
    """
    if output_dir is None:
        raise UserError("--ckpt_path last is the last checkpoint in --output_dir; give the folder of the fit as well")
    last = Path(output_dir).expanduser() / "checkpoints" / LAST
    if last.is_file():
        return str(last)
    notice(f"there is no '{last}' yet; the fit begins at its first step")
    return None


@rank_zero_only
def _say_where(run_folder: Path) -> None:
    print(run_folder)
