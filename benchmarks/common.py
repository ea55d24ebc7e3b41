"""Shared parts of the benchmarks: steps as Lightning takes them, their frozen parts, clocks, configs of trainings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import lightning as L
import torch
import yaml  # type: ignore[import-untyped]
from jsonargparse import Namespace
from lightning.fabric import Fabric
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

# Imported so that configs may name their classes without a path.
import tokenlearn.data.image_datamodule
import tokenlearn.data.prompts
import tokenlearn.diffusion.solvers
import tokenlearn.guidance
import tokenlearn.objectives
import tokenlearn.training  # noqa: F401
from tokenlearn.errors import UserError
from tokenlearn.metrics import timed
from tokenlearn.models import DiffusionBackbone, StableDiffusion, TimmClassifier
from tokenlearn.paths import resolve_config
from tokenlearn.token_task import TokenTask
from tokenlearn.training import TokenTraining

_SECTIONS = ("seed_everything", "model", "data", "trainer")


class TaskStep:
    """A training step as Lightning takes it, on the next batch.

    It runs under Lightning Fabric, which calls the same ``training_step`` under the same precision as the Trainer,
    without the Trainer's loop, loggers and callbacks.

    Args:
        task: the task.
        optimizer: optimizer of the learned parameters.
        fabric: precision and device.
        after_backward: called between the backward pass and the optimizer step, for instance to clip gradients.
        batches: the first batch of a new iteration is the next batch.
    """

    def __init__(
        self,
        task: TokenTraining,
        optimizer: Optimizer,
        fabric: Fabric,
        after_backward: Callable[[], None] | None = None,
        batches: Iterable[Any] = (),
    ) -> None:
        self.task: Any = fabric.setup_module(task)
        self.optimizer: Optimizer | None = optimizer
        self.fabric = fabric
        self.after_backward = after_backward
        self.batches = batches

    def __call__(self) -> None:
        """Take a step."""
        assert self.optimizer is not None
        with self.fabric.autocast():  # on one device, Fabric leaves precision around steps to its caller
            loss = self.task.training_step(next(iter(self.batches)))
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        if self.after_backward is not None:
            self.after_backward()
        self.optimizer.step()


class BareParts:
    """The frozen parts of a step, without anything around them.

    Args:
        backbone: a Stable Diffusion, whose network and decoder are used.
        classifier: classifier of the images.
        fabric: precision.
    """

    def __init__(self, backbone: DiffusionBackbone, classifier: TimmClassifier, fabric: Fabric) -> None:
        backbone = cast(StableDiffusion, backbone)
        self.fabric, self.network, self.vae = fabric, backbone.unet, backbone.vae
        self.classifier = classifier.model
        self.scaling_factor = float(backbone.vae.config.scaling_factor)
        with torch.no_grad():
            images = backbone.decode_latents(backbone.initial_latents([0]))
            self.input_size = classifier.preprocess(images).shape[-2:]

    def unet(self, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        """Evaluate the network."""
        output: Tensor = self.network(latents, timesteps, embeds, return_dict=False)[0]
        return output

    def loss(self, latents: Tensor, targets: Tensor) -> Tensor:
        """Decode, resize if the classifier's inputs have another size, classify, and compare with the targets."""
        images = self.vae.decode(latents / self.scaling_factor, return_dict=False)[0]
        if images.shape[-2:] != self.input_size:
            images = functional.interpolate(images.float(), self.input_size, mode="bicubic", antialias=True)
        return functional.cross_entropy(self.classifier(images), targets)


class RowCounter:
    """Number of rows that the network is evaluated for, without and with gradient.

    Args:
        network: called with latents, timesteps and prompt embeds.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.without_gradient = self.with_gradient = 0

    def count(self, step: Callable[[], None]) -> None:
        """Take one step and count; rows that checkpointing recomputes count again."""
        self.without_gradient = self.with_gradient = 0

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            latents, _, embeds = args
            if torch.is_grad_enabled() and (latents.requires_grad or embeds.requires_grad):
                self.with_gradient += len(latents)
            else:
                self.without_gradient += len(latents)

        handle = self.network.register_forward_pre_hook(hook)
        try:
            step()
        finally:
            handle.remove()


def take_turns(steps: Sequence[Callable[[], None]], repetitions: int, device: torch.device) -> list[tuple[float, ...]]:
    """Seconds of each step in each round; every round reverses the order."""
    rounds = []
    for repetition in range(repetitions):
        order = range(len(steps)) if repetition % 2 == 0 else reversed(range(len(steps)))
        seconds = {index: timed(steps[index], device)[1] for index in order}
        rounds.append(tuple(seconds[index] for index in range(len(steps))))
    return rounds


def parse_config(path: str) -> Namespace:
    """Settings of a config for ``tokenlearn fit``, in sections ``model``, ``data`` and ``trainer``, with all defaults.

    Args:
        path: config file, or the name of a bundled one. Its other sections, such as callbacks, are left out; ``data``
            may be missing.
    """
    sections = yaml.safe_load(resolve_config(path).read_text())
    settings = _parser().parse_object({name: sections[name] for name in _SECTIONS if name in sections})
    assert isinstance(settings, Namespace)
    return settings


def parse_judged_config(path: str) -> Namespace:
    """:func:`parse_config` of a training with a judge.

    Raises:
        UserError: if the config has no judge.
    """
    settings = parse_config(path)
    if settings["model.init_args.judge"] is None:
        raise UserError(f"'{path}' has no judge; set model.judge to an objective with another model")
    return settings


def instantiate(settings: Namespace, changes: Mapping[str, Any]) -> Namespace:
    """Make the task and the data module of a config.

    Args:
        settings: settings from :func:`parse_config`, which stay as they are.
        changes: key, such as ``model.init_args.seed``, to value or object.

    Returns:
        Task and data module as ``model`` and ``data``, and the settings of the trainer as ``trainer``.
    """
    changed = settings.clone()
    for key, value in changes.items():
        changed[key] = value
    # Deprecated since jsonargparse 4.49, but the new name would be above our lower bound.
    made: Namespace = _parser().instantiate_classes(changed)
    return made


def fit_quietly(
    settings: Namespace, changes: Mapping[str, Any], seed: int, callback: L.Callback, max_steps: int, check_every: int
) -> None:
    """Train as ``tokenlearn fit`` does, without its files and bars, and with a full validation before the first step.

    Args:
        settings: settings of the config.
        changes: key to value of settings that differ from the config.
        seed: seed of everything that is random, except for seeds among the task's settings and the changes.
        callback: callback that observes the training.
        max_steps: number of steps.
        check_every: steps between validations.
    """
    L.seed_everything(seed, verbose=False)
    run = instantiate(settings, {"data.init_args.seed": seed, **changes})
    changed = {
        "max_steps": max_steps,
        "num_sanity_val_steps": -1,  # all of the validation, before the first step
        "val_check_interval": check_every,
        "check_val_every_n_epoch": None,  # the interval is in steps, over the ends of epochs
        "callbacks": [callback],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    # A line per training would hide the results.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # Lightning's own code, which users cannot change.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
        # The frozen stack is in eval mode on purpose.
        warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode.*")
        L.Trainer(**(run.trainer.as_dict() | changed)).fit(run.model, datamodule=run.data)


def _parser() -> LightningArgumentParser:
    parser = LightningArgumentParser()
    parser.add_argument("--seed_everything", type=bool | int, default=True)
    parser.add_lightning_class_args(TokenTask, "model", subclass_mode=True)
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True, required=False)
    parser.add_lightning_class_args(L.Trainer, "trainer")
    return parser
