"""What the benchmarks share: steps as Lightning takes them, their bare parts, clocks, and configs of the trainings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.fabric import Fabric
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

# Imported so that configs may name their classes without a path.
import tokenlearn.data.image_datamodule
import tokenlearn.data.prompts  # noqa: F401
from tokenlearn.methods import Caso, ClassTokens, TokenTask
from tokenlearn.metrics import timed
from tokenlearn.models import StableDiffusion


class TaskStep:
    """A step of the task as Lightning takes it, on the next of its batches.

    It runs under Lightning Fabric, which calls the same ``training_step`` under the same precision as the Trainer,
    without the Trainer's loop, loggers and callbacks.

    Args:
        task: the task.
        optimizer: over whatever is learned.
        fabric: precision and device.
        after_backward: what to do to gradients before the optimizer step.
        batches: the next batch is the first of a new iteration.
    """

    def __init__(
        self,
        task: ClassTokens | Caso,
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
        task: where network, decoder and classifier are.
        fabric: precision.
    """

    def __init__(self, task: ClassTokens | Caso, fabric: Fabric) -> None:
        backbone = cast(StableDiffusion, task.backbone)
        self.fabric, self.network, self.vae = fabric, backbone.unet, backbone.vae
        self.classifier = task.classifier.model
        self.scaling_factor = float(backbone.vae.config.scaling_factor)
        with torch.no_grad():
            images = backbone.decode_latents(backbone.initial_latents([0]))
            self.input_size = task.classifier.preprocess(images).shape[-2:]

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
    """Counts the rows that the network is evaluated for, without and with gradient.

    Args:
        network: called with latents, timesteps and prompt embeds.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.without_gradient = self.with_gradient = 0

    def count(self, step: Callable[[], None]) -> None:
        """Take one step and count; rows recomputed by checkpointing count again."""
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
    """Seconds of each step in each round; the order turns around every round."""
    rounds = []
    for repetition in range(repetitions):
        order = range(len(steps)) if repetition % 2 == 0 else reversed(range(len(steps)))
        seconds = {index: timed(steps[index], device)[1] for index in order}
        rounds.append(tuple(seconds[index] for index in range(len(steps))))
    return rounds


def parse_config(path: str) -> Namespace:
    """Settings of a config for ``tokenlearn fit``, in sections ``model``, ``data`` and ``trainer``, with all defaults.

    Args:
        path: config file; it may have no other sections, and ``data`` may be missing.
    """
    settings = _parser().parse_path(path)
    assert isinstance(settings, Namespace)
    return settings


def instantiate(settings: Namespace, changes: Mapping[str, Any]) -> Namespace:
    """Make the task and the data module of a config.

    Args:
        settings: from :func:`parse_config`; they are not changed.
        changes: key, such as ``model.init_args.seed``, to value.

    Returns:
        ``model`` and ``data``; ``trainer`` are still settings.
    """
    changed = settings.clone()
    for key, value in changes.items():
        changed[key] = value
    # Its new name came with jsonargparse 4.49, above our bound.
    made: Namespace = _parser().instantiate_classes(changed)
    return made


def fit_quietly(
    settings: Namespace, changes: Mapping[str, Any], seed: int, callback: L.Callback, max_steps: int, check_every: int
) -> None:
    """Train as ``tokenlearn fit`` does, without its files and bars, with the whole validation before the first step.

    Args:
        settings: of its config.
        changes: key to value that is another in this training.
        seed: of everything that is random, but for a seed that the task has of its own.
        callback: looks at the training.
        max_steps: where it stops in any case.
        check_every: steps between validations.
    """
    L.seed_everything(seed, verbose=False)
    run = instantiate(settings, {**changes, "data.init_args.seed": seed})
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
    # One line for each of many trainings says nothing.
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
