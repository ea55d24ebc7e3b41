"""The Lightning set-up that every script of ``data_prep`` shares: resumable, averaged, by number of steps."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 200) -> LambdaLR:
    """Linear warm-up, then half a cosine down to 2 % of the learning rate."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min((step - warmup) / max(1, steps - warmup), 1.0)
        return 0.02 + 0.49 * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))

    return LambdaLR(optimizer, factor)


class TrainedBySteps(L.LightningModule):
    """A module trained with AdamW for a known number of steps."""

    def __init__(self, steps: int, learning_rate: float, weight_decay: float = 1e-4) -> None:
        super().__init__()
        self.steps, self.learning_rate, self.weight_decay = steps, learning_rate, weight_decay

    def configure_optimizers(self):  # type: ignore[no-untyped-def]  # noqa: ANN201
        """AdamW under ``warmup_cosine``."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = AdamW(trainable, lr=self.learning_rate, weight_decay=self.weight_decay, fused=True)
        return [optimizer], [{"scheduler": warmup_cosine(optimizer, self.steps), "interval": "step"}]


def train(module: TrainedBySteps, loader: DataLoader[torch.Tensor], folder: Path, ema_decay: float | None) -> None:
    """Train for ``module.steps`` steps, going on from the last checkpoint in ``folder`` if there is one.

    Afterwards the module holds the averaged weights when ``ema_decay`` is given.
    """
    checkpoints = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=250)
    callbacks: list[L.Callback] = [checkpoints, LearningRateMonitor()]
    if ema_decay is not None:
        callbacks.append(EMAWeightAveraging(decay=ema_decay, update_every_n_steps=4))
    trainer = L.Trainer(
        max_steps=module.steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=25,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(module, loader, ckpt_path=str(last) if last.exists() else None)
