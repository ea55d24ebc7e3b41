"""Training of a classifier on labelled images in memory, by Lightning: resumable, and the same again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from tokenlearn.data.image_arrays import ImageArrays
from tokenlearn.data.sources import Item, ShuffledSource
from tokenlearn.data.streams import BatchStream
from tokenlearn.errors import UserError, check_at_least, reason_of
from tokenlearn.models.classifier import check_architecture
from tokenlearn.progress import Meter

_SMALLEST_CROP = 0.7  # of the side
_BLURRED = 0.3  # of the images
_CHECKPOINT_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a classifier is trained.

    Attributes:
        architecture: timm model.
        pretrained: start from timm's weights, which are downloaded, instead of random ones.
        steps: optimizer steps.
        batch_size: images per step.
        learning_rate: of AdamW, at the peak of one cycle.
        weight_decay: of AdamW.
        flips: mirror each image with probability 1/2.
        seed: of the weights, the order of the images and their augmentation.

    Raises:
        UserError: if a number is out of range, or timm has no such model.
    """

    architecture: str
    pretrained: bool = False
    steps: int = 400
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    flips: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("training", 1, steps=self.steps, batch_size=self.batch_size)
        check_at_least("training", 0, learning_rate=self.learning_rate, weight_decay=self.weight_decay, seed=self.seed)
        check_architecture(self.architecture, "architecture")


class TrainedClassifier(NamedTuple):
    """A trained timm model in eval mode, and what has to be saved beside its weights.

    Attributes:
        model: the model.
        data_config: its preprocessing, as timm names it.
        model_args: arguments of ``timm.create_model``.
    """

    model: nn.Module
    data_config: dict[str, Any]
    model_args: dict[str, Any]


class LabelledPixels(NamedTuple):
    """A batch of augmented images (B, 3, H, W) in [0, 1] and their class indices (B,)."""

    images: Tensor
    labels: Tensor


class ClassifierModule(L.LightningModule):
    """Cross-entropy of a timm model, in which every class weighs the same however many images it has.

    Args:
        model: the model.
        settings: of the training.
        mean: of each channel, by which images in [0, 1] are normalised.
        std: of each channel.
        counts: (K,) training images of each class.
    """

    mean: Tensor
    std: Tensor
    class_weights: Tensor

    def __init__(
        self, model: nn.Module, settings: TrainingSettings, mean: Sequence[float], std: Sequence[float], counts: Tensor
    ) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("class_weights", counts.sum() / (len(counts) * counts.float()), persistent=False)
        self.accuracy = MulticlassAccuracy(num_classes=len(counts), average="micro")

    def training_step(self, batch: LabelledPixels) -> Tensor:
        """Loss of a batch; logs it with the accuracy."""
        logits = self.model((batch.images - self.mean) / self.std)
        loss = functional.cross_entropy(logits, batch.labels, weight=self.class_weights)
        if not loss.isfinite():
            raise UserError(f"the loss is {loss.item()} at step {self.global_step}; lower --learning_rate")
        self.log("loss", loss.detach(), logger=False)
        self.log("accuracy", self.accuracy(logits.detach(), batch.labels), logger=False)
        return loss

    def configure_optimizers(self) -> L.pytorch.utilities.types.OptimizerLRScheduler:
        """AdamW under one cycle."""
        settings = self.settings
        optimizer = torch.optim.AdamW(self.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, settings.steps, pct_start=0.2
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class _Progress(L.Callback):
    """A bar or lines of the training."""

    def __init__(self, caption: str, steps: int) -> None:
        self.caption, self.steps = caption, steps
        self._meter: Meter | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._meter = Meter(self.caption, self.steps, done=trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, *others: Any) -> None:  # noqa: ANN401 - Lightning's hook
        figures: Mapping[str, Tensor] = trainer.callback_metrics
        assert self._meter is not None
        self._meter.update(figures=", ".join(f"{name} {figures[name]:.3f}" for name in ("loss", "accuracy")))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._meter is not None:
            self._meter.close()


def train_classifier(
    arrays: ImageArrays, rows: NDArray[np.int64], settings: TrainingSettings, *, folder: Path, caption: str
) -> TrainedClassifier:
    """Train a classifier, going on from the last checkpoint in a folder if there is one.

    Args:
        arrays: labelled images.
        rows: (n,) rows to train on.
        settings: of the training.
        folder: of checkpoints, which must be of the same images and settings.
        caption: of the progress.

    Raises:
        UserError: if the model cannot be made or does not take images of this size, or the loss is not finite.
    """
    size = arrays.pixels.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model, data_config, model_args = _make_model(settings, len(arrays.class_names), size)
    counts = torch.from_numpy(np.bincount(arrays.labels[rows], minlength=len(arrays.class_names)))
    module = ClassifierModule(model, settings, data_config["mean"], data_config["std"], counts)
    loader = BatchStream(
        ShuffledSource(len(rows), settings.seed),
        partial(_sample, arrays, rows, settings),
        _collate,
        batch_size=settings.batch_size,
        length=settings.steps,
    )
    checkpoints = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=_CHECKPOINT_EVERY)
    trainer = L.Trainer(
        max_steps=settings.steps,
        max_epochs=-1,
        devices=1,
        callbacks=[checkpoints, _Progress(caption, settings.steps)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    last = folder / "last.ckpt"
    trainer.fit(module, loader, ckpt_path=last if last.is_file() else None)
    return TrainedClassifier(model.cpu().eval(), data_config, model_args)


def augmented(pixels: NDArray[np.uint8], generator: torch.Generator, flips: bool) -> Tensor:
    """An image (3, H, W) in [0, 1] with another crop, brightness, contrast and sharpness.

    Generated images, and still more the predictions that guides see, are softer than photos, so some are blurred.

    Args:
        pixels: (H, W, 3) uint8.
        generator: decides what is changed.
        flips: whether half of the images are mirrored.
    """
    image: Tensor = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float()[None] / 255
    height, width = image.shape[-2:]
    chosen: list[float] = torch.rand(8, generator=generator).tolist()
    crop, down, right, mirrored, contrast, brightness, blurred, scale = chosen
    share = 1 - (1 - _SMALLEST_CROP) * crop
    crop_height, crop_width = round(share * height), round(share * width)
    top, left = round(down * (height - crop_height)), round(right * (width - crop_width))
    image = _resized(image[..., top : top + crop_height, left : left + crop_width], (height, width))
    if flips and mirrored < 0.5:
        image = image.flip(-1)
    if blurred < _BLURRED:
        small = [max(1, round((0.25 + 0.5 * scale) * side)) for side in (height, width)]
        image = _resized(_resized(image, small), (height, width))
    centre = image.mean()
    image = (image - centre) * (0.8 + 0.4 * contrast) + centre + 0.2 * (brightness - 0.5)
    augmented: Tensor = image[0].clamp(0, 1)
    return augmented


def _resized(image: Tensor, size: Sequence[int]) -> Tensor:
    resized: Tensor = functional.interpolate(
        image, size=tuple(size), mode="bicubic", antialias=True, align_corners=False
    )
    return resized


def _sample(arrays: ImageArrays, rows: NDArray[np.int64], settings: TrainingSettings, item: Item) -> LabelledPixels:
    """One image, whose augmentation depends on nothing but its place in the data and the pass."""
    row = int(rows[item.index])
    seed = int(np.random.SeedSequence([settings.seed, item.pass_number, item.index]).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(seed)
    return LabelledPixels(
        augmented(arrays.pixels[row], generator, settings.flips), torch.tensor(int(arrays.labels[row]))
    )


def _collate(samples: Sequence[LabelledPixels]) -> LabelledPixels:
    return LabelledPixels(*(torch.stack(parts) for parts in zip(*samples, strict=True)))


def _make_model(settings: TrainingSettings, num_classes: int, size: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A timm model for images of a size, its preprocessing, and the arguments that made it."""
    import timm
    from timm.data.config import resolve_model_data_config

    name = settings.architecture
    config = timm.get_pretrained_cfg(name)
    arguments: dict[str, Any] = {"img_size": size} if config is not None and config.fixed_input_size else {}
    try:
        model: Any = timm.create_model(name, pretrained=settings.pretrained, num_classes=num_classes, **arguments)
        model.train()(torch.zeros(2, 3, size, size))  # a network may need larger images, or sides of a multiple
    except Exception as error:  # of the hub, or of a network's shapes
        way_out = "check the network, or set --pretrained false" if settings.pretrained else "give another --size or"
        raise UserError(
            f"cannot make {name} for images of {size}x{size} pixels ({reason_of(error)}); {way_out}"
            + ("" if settings.pretrained else " architecture")
        ) from error
    data: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    data_config = {
        "input_size": (3, size, size),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": tuple(data["mean"]),
        "std": tuple(data["std"]),
    }
    return model, data_config, arguments
