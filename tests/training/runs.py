"""Short trainings on the CPU by Lightning's trainer, without files unless a test asks for them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import SGD


def no_change(params: Any) -> SGD:
    """An optimizer that leaves the tokens as they are, so that a test can compute the gradient again."""
    return SGD(params, lr=0.0)


class Batches:
    """A loader of given batches; Lightning takes a list for several loaders."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Recorder(L.Callback):
    """Loss and gradients of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[Tensor] = []

    def on_after_backward(self, trainer, pl_module):
        self.gradients.append(pl_module.bank.vectors[0].grad.clone())

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.losses.append(float(outputs["loss"]))


def fit(
    task: L.LightningModule,
    data: L.LightningDataModule | Iterable[Any],
    *,
    max_steps: int = 1,
    folder: Path | None = None,
    ckpt_path: str | None = None,
    callbacks: Iterable[L.Callback] = (),
    **options: Any,
) -> L.Trainer:
    """Train on a data module, or on a list of batches that is repeated.

    With a folder, every step writes ``last.ckpt`` there.
    """
    trainer = L.Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": max_steps,
            "logger": False,
            "enable_checkpointing": folder is not None,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "callbacks": [*callbacks, *([] if folder is None else [every_step(folder)])],
        }
        | options
    )
    if isinstance(data, L.LightningDataModule):
        trainer.fit(task, datamodule=data, ckpt_path=ckpt_path)
    else:
        trainer.fit(task, train_dataloaders=Batches(data), ckpt_path=ckpt_path)
    return trainer


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)


def one_step(task: L.LightningModule, batch: Any, **options: Any) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient of the vectors, and logged figures of one step on a batch."""
    recorder = Recorder()
    trainer = fit(task, [batch], callbacks=[recorder], **options)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return recorder.losses[0], recorder.gradients[0], logged


def validate(task: L.LightningModule, batches: Iterable[Any]) -> dict[str, float]:
    """Logged figures of a validation."""
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(task, dataloaders=Batches(batches), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
