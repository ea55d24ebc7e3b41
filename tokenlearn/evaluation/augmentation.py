"""Evaluation of generated images as training data, beside few real ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional

from tokenlearn.data.pixels import unit_range
from tokenlearn.data.sources import Item, items_below
from tokenlearn.data.streams import EvaluationBatches
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.evaluation.base import Evaluation
from tokenlearn.evaluation.real_images import RealImages
from tokenlearn.evaluation.records import Record
from tokenlearn.evaluation.table import Cell, Column, Figure, Row, Table
from tokenlearn.generation.generate import Generate
from tokenlearn.guidance import check_tokens
from tokenlearn.metrics import two_way_bootstrap_interval
from tokenlearn.models import DiffusionBackbone
from tokenlearn.pipeline import Sampling
from tokenlearn.progress import Meter
from tokenlearn.tokens import Embeddings

REAL, AUGMENTED, RIVAL = "real", "real_and_generated", "real_and_rival"


@dataclass(frozen=True, kw_only=True)
class ClassifierTraining:
    """Training of the small classifiers that are compared, from random weights.

    Attributes:
        architecture: timm model.
        steps: of the optimizer, the same with and without generated images.
        batch_size: images at once.
        learning_rate: of AdamW, at the start; it falls to 0 as a cosine.
        weight_decay: of AdamW.

    Raises:
        UserError: if a number is out of range, or timm has no such model.
    """

    architecture: str = "resnet10t"
    steps: int = 300
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        check_at_least("training", 1, steps=self.steps, batch_size=self.batch_size)
        check_at_least("training", 0, learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        import timm

        if not timm.is_model(self.architecture):
            nearest = difflib.get_close_matches(self.architecture, timm.list_models(), 1)
            hint = f"did you mean {nearest[0]}?" if nearest else "give another, such as resnet10t"
            raise UserError(f"training.architecture '{self.architecture}' is no model of timm; {hint}")


class SmallClassifier(L.LightningModule):
    """A timm model that is trained from random weights.

    Args:
        training: settings.
        num_classes: number of classes.
    """

    def __init__(self, training: ClassifierTraining, num_classes: int) -> None:
        super().__init__()
        import timm

        self.training_settings = training
        self.model = timm.create_model(training.architecture, pretrained=False, num_classes=num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, H, W) in [0, 1]."""
        logits: Tensor = self.model(2 * images - 1)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy of images (B, H, W, 3) uint8 and labels (B,)."""
        pixels, labels = batch
        return functional.cross_entropy(self(unit_range(list(pixels))), labels)

    def configure_optimizers(self) -> L.pytorch.utilities.types.OptimizerLRScheduler:
        """AdamW under a cosine."""
        settings = self.training_settings
        optimizer = torch.optim.AdamW(self.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class _RandomBatches:
    """Batches of uniformly drawn images, as many as there are steps, mirrored at random."""

    def __init__(self, pixels: Tensor, labels: Tensor, training: ClassifierTraining, seed: int) -> None:
        self.pixels, self.labels, self.training, self.seed = pixels, labels, training, seed

    def __len__(self) -> int:
        return self.training.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        size = self.training.batch_size
        for _ in range(self.training.steps):
            rows = torch.randint(len(self.pixels), (size,), generator=generator)
            mirrored = torch.rand(size, generator=generator) < 0.5
            pixels = self.pixels[rows]
            yield torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels), self.labels[rows]


class _Beat(L.Callback):
    """Counts training steps as parts of the classifier that is under way."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_batch_end(self, *args: Any) -> None:  # noqa: ANN401 - no argument is used
        """See :class:`lightning.Callback`."""
        self.meter.beat("training step")


def train_classifier(
    pixels: Tensor,
    labels: Tensor,
    num_classes: int,
    training: ClassifierTraining,
    *,
    seed: int,
    device: torch.device,
    callbacks: Sequence[L.Callback] = (),
) -> SmallClassifier:
    """Train a classifier on images; the same seed begins with the same weights.

    Args:
        pixels: (N, H, W, 3) uint8.
        labels: (N,) class indices.
        num_classes: number of classes.
        training: settings.
        seed: of the weights, and of the batches.
        device: where to train.
        callbacks: of the Trainer, such as a progress.

    Returns:
        The classifier, frozen and in eval mode.
    """
    # Inside the inference mode of a Trainer nothing could be trained.
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = SmallClassifier(training, num_classes)
        trainer = L.Trainer(
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            max_epochs=1,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(classifier, train_dataloaders=_RandomBatches(pixels, labels, training, seed))
    return classifier.to(device).eval().requires_grad_(False)


class AugmentationEvaluation(Evaluation[Generate]):
    """Accuracy of classifiers that are trained on few real images, with and without generated ones.

    The experiment of table 2 of class tokens (Schwartz et al., 2023, https://arxiv.org/abs/2303.17155) in small. For
    each number of real images and each run, two classifiers are trained from the same weights for the same steps: on
    that number of real images of each class, and on these and the generated images; and a third one with the images
    of ``rival_prompts`` in place of the tokens', where there are such. All are tested on held-out real images. Run it
    by ``tokenlearn test``, on one device; a config has no data section.

    Args:
        backbone: frozen diffusion model.
        prompts: class to a prompt with its token.
        real: labelled real images; the last ``held_out`` of each class test, and the others are drawn from.
        numbers: numbers of real images of each class to train on.
        generated: generated images of each class.
        held_out: real images of each class to test on.
        runs: repetitions with other real images and other first weights.
        first_seed: seed of the first generated image of each class.
        rival_prompts: class to a prompt without its token, such as a description; none for no such columns.
        training: training of the classifiers.
        embeddings: embedding files of the tokens; those of a checkpoint (``--ckpt_path``) replace them.
        sampling: settings of the sampler.
        batch_size: generated images at once.

    Raises:
        UserError: if there are fewer than two classes, rival prompts are of other ones, or a number is out of range.
    """

    task_class = Generate

    def __init__(
        self,
        backbone: DiffusionBackbone,
        prompts: dict[str, str],
        real: RealImages,
        *,
        numbers: list[int] = [5, 10, 20],  # noqa: B006 - read only; a list is what YAML shows
        generated: int = 50,
        held_out: int = 50,
        runs: int = 5,
        first_seed: int = 1000,
        rival_prompts: dict[str, str] = {},  # noqa: B006 - read only
        training: ClassifierTraining = ClassifierTraining(),
        embeddings: Embeddings = [],  # noqa: B006 - read only
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        batch_size: int = 10,
    ) -> None:
        super().__init__()
        if len(prompts) < 2:
            raise UserError(f"model.prompts has {len(prompts)} classes and a classifier needs 2; add a class")
        if rival_prompts and (other := set(prompts) ^ set(rival_prompts)):
            raise UserError(
                f"model.prompts and model.rival_prompts must have the same classes, and '{min(other)}' is in one alone"
            )
        check_at_least("model", 1, generated=generated, held_out=held_out, runs=runs, batch_size=batch_size)
        if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 1:
            raise UserError(f"model.numbers must be different numbers of at least 1, got {numbers}")
        if real.images < held_out + max(numbers):
            raise UserError(
                f"model.real.images {real.images} are too few for {held_out} held-out images and {max(numbers)} to "
                f"train on; set it to {held_out + max(numbers)} or more"
            )
        self.of(Generate(backbone, embeddings=embeddings, sampling=sampling))
        self.real, self.numbers = real, numbers
        self.prompts_of = {AUGMENTED: prompts} | ({RIVAL: rival_prompts} if rival_prompts else {})
        self.class_names = list(prompts)
        self.generated, self.held_out, self.runs = generated, held_out, runs
        self.first_seed, self.training_settings, self.batch_size = first_seed, training, batch_size
        self.generated_pixels: dict[str, dict[str, list[Tensor]]] = {}
        self.real_pixels: dict[str, Tensor] = {}

    def on_test_start(self) -> None:
        """Read the real images.

        Raises:
            UserError: on several devices, if a token is not loaded, or a class has too few real images.
        """
        super().on_test_start()
        if self.trainer.world_size > 1:
            raise UserError(
                f"classifiers are trained on one device, and trainer.devices is {self.trainer.world_size}; set it to 1"
            )
        check_tokens(
            [prompt for prompts in self.prompts_of.values() for prompt in prompts.values()],
            self.task.learned_placeholders,
        )
        self.generated_pixels = {method: {name: [] for name in self.class_names} for method in self.prompts_of}
        self.real_pixels = self.real.of_classes(self.class_names, self.task.image_size)
        for name, pixels in self.real_pixels.items():
            if len(pixels) < self.held_out + max(self.numbers):
                raise UserError(
                    f"class '{name}' has {len(pixels)} real images and needs {self.held_out + max(self.numbers)}; "
                    "give a larger model.real.source, or lower model.held_out"
                )

    def test_dataloader(self) -> EvaluationBatches[tuple[str, str, int], list[tuple[str, str, int]]]:
        """All classes of all methods that generate, with all seeds."""
        kinds = [(method, name) for method in self.prompts_of for name in self.class_names]
        number = len(kinds) * self.generated

        def load(item: Item) -> tuple[str, str, int]:
            kind, image = divmod(item.index, self.generated)
            return *kinds[kind], self.first_seed + image

        return EvaluationBatches(
            partial(items_below, number), number, load, list, batch_size=self.batch_size, rank=0, world_size=1
        )

    @torch.no_grad()
    def test_step(self, batch: list[tuple[str, str, int]]) -> None:
        """Generate the images of a batch."""
        prompts = [self.prompts_of[method][name] for method, name, _ in batch]
        images = self.task.pipeline.generate(prompts, [seed for *_, seed in batch]).clamp(0, 1)
        for image, (method, name, _) in zip(images, batch, strict=True):
            self.generated_pixels[method][name].append((255 * image).round().byte().movedim(0, -1).cpu())
            self.image_rows.add(name if method == AUGMENTED else f"{name}, rival", image[None])

    def on_test_epoch_end(self) -> None:
        """Train and test the classifiers, and make the table."""
        generated = {
            method: torch.stack([image for images in of_classes.values() for image in images])
            for method, of_classes in self.generated_pixels.items()
        }
        generated_labels = torch.arange(len(self.class_names)).repeat_interleave(self.generated)
        held_out = torch.cat([pixels[-self.held_out :] for pixels in self.real_pixels.values()])
        labels = torch.arange(len(self.class_names)).repeat_interleave(self.held_out)
        names = [f"{name} {place}" for name in self.class_names for place in range(self.held_out)]
        trainings = [
            (run, number, method)
            for run in range(self.runs)
            for number in self.numbers
            for method in (REAL, *generated)
        ]
        with Meter("training classifiers", len(trainings), unit="classifier") as meter:
            for run, number, method in trainings:
                pixels, of_pixels = self._drawn(number, run)
                if method in generated:
                    pixels = torch.cat([pixels, generated[method]])
                    of_pixels = torch.cat([of_pixels, generated_labels])
                classifier = train_classifier(
                    pixels,
                    of_pixels,
                    len(self.class_names),
                    self.training_settings,
                    seed=run,
                    device=self.device,
                    callbacks=[_Beat(meter)],
                )
                correct = self._predicted(classifier, held_out) == labels
                self.records.update("correct", correct, names, method=method, item=str(number), side=f"run {run}")
                meter.update(figures=f"{method} {number}: accuracy {correct.float().mean():.3f}")
        super().on_test_epoch_end()

    def _drawn(self, number: int, run: int) -> tuple[Tensor, Tensor]:
        """Real images (C number, H, W, 3) to train on and their labels; more of a run contain the fewer."""
        generator = torch.Generator().manual_seed(run)
        chosen = []
        for pixels in self.real_pixels.values():
            pool = pixels[: -self.held_out]
            chosen.append(pool[torch.randperm(len(pool), generator=generator)[:number]])
        return torch.cat(chosen), torch.arange(len(chosen)).repeat_interleave(number)

    @torch.no_grad()
    def _predicted(self, classifier: SmallClassifier, pixels: Tensor) -> Tensor:
        """Class indices (N,) of images (N, H, W, 3) uint8."""
        parts = [unit_range(list(part)).to(self.device) for part in torch.split(pixels, 256)]
        return torch.cat([classifier(part).argmax(dim=1) for part in parts]).cpu()

    def make_table(self, records: list[Record]) -> Table:
        """See :class:`Evaluation`: a row per number of real images."""
        table = augmentation_table(records, self.numbers)
        table.images = {"generated": self.image_rows.rows()}
        settings = self.training_settings
        table.notes.append(
            f"{settings.architecture} from random weights, {settings.steps} steps of {settings.batch_size} images; "
            f"{self.generated} generated images and {self.held_out} held-out images a class; {self.runs} runs"
        )
        return table


def augmentation_table(records: Sequence[Record], numbers: Sequence[int]) -> Table:
    """The table of :class:`AugmentationEvaluation`, without images.

    Args:
        records: of the measure ``correct``, with the run as their side.
        numbers: numbers of real images, the rows.
    """
    methods = [method for method in (REAL, AUGMENTED, RIVAL) if any(record.method == method for record in records)]
    differences = {"difference": (AUGMENTED, REAL)}
    if RIVAL in methods:
        differences |= {"rival_difference": (RIVAL, REAL), "over_rival": (AUGMENTED, RIVAL)}
    columns = [
        Column(name=method, kind="share", measure="correct", method=method, interval=True, bar=True)
        for method in methods
    ]
    columns += [Column(name=name, kind="difference", measure="correct", interval=True) for name in differences]
    rows: list[Row] = []
    summary: dict[str, Figure] = {}
    for number in numbers:
        tables = {method: _by_run(records, str(number), method) for method in methods}
        tables |= {name: tables[one] - tables[other] for name, (one, other) in differences.items()}
        cells = {
            name: Cell(float(table.mean()), *two_way_bootstrap_interval(table), table.numel())
            for name, table in tables.items()
        }
        rows.append(Row(f"{number} real images a class", cells))
        for name, cell in cells.items():
            summary[f"{name}_{number}"] = Figure(cell.value or 0.0, "difference" if name in differences else "share")
    return Table(
        title="accuracy of classifiers on held-out real images",
        heading="trained on",
        columns=columns,
        rows=rows,
        summary=summary,
        notes=["intervals by the bootstrap over runs and held-out images"],
    )


def _by_run(records: Sequence[Record], item: str, method: str) -> Tensor:
    """Values (R, N) of R runs and N images, in the same order for every method."""
    runs: dict[str, dict[int | str, float]] = {}
    for record in records:
        if (record.item, record.method) == (item, method):
            runs.setdefault(record.side, {})[record.seed] = record.value
    tables = [[value for _, value in sorted(runs[run].items(), key=lambda pair: str(pair[0]))] for run in sorted(runs)]
    return torch.tensor(tables, dtype=torch.float32)
