"""Labelled images, and the edits of CASO written out."""

from collections.abc import Sequence

import lightning as L
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional

from tests.training.runs import Batches
from tokenlearn.data.batches import ImageBatch
from tokenlearn.data.interfaces import LabelledImages
from tokenlearn.diffusion import convert
from tokenlearn.guidance import ClassifierFreeGuidance
from tokenlearn.training import Caso
from tokenlearn.training.caso_targets import EditTargets, choose_targets, present_classes

LABELS = ["smile", "hat", "black", "brown", "red"]
TOKENS = ["<no-smile>", "<smile>", "<black>", "<brown>", "<red>"]
ATTRIBUTES = {"smile": None, "hair": ["black", "brown", "red"]}


class OfCleanImages(ClassifierFreeGuidance):
    """Classifier-free guidance of the predicted clean images, which is that of the predicted noise."""

    def guide(self, model, latents, timestep, step, recompute=False):
        process = model.process
        predictions = model.predictions(latents, timestep, step, recompute)
        x0 = self([process.x0(latents, prediction, timestep) for prediction in predictions], step)
        alpha, sigma = process.alpha(timestep), process.sigma(timestep)
        return convert(x0, latents, alpha, sigma, source="x0", target=process.kind)


def image_batch(count: int = 4, labels: dict[str, Tensor] | None = None, seed: int = 0) -> ImageBatch:
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return ImageBatch(images, None, labels or {}, [f"{seed}-{index}.png" for index in range(count)])


def labelled_batches() -> list[ImageBatch]:
    """Two batches with labels of smiles, one unknown, and of an attribute that no model learns."""
    smiles = [torch.tensor([0, 1, 1, -1]), torch.tensor([1, 0, 0, 1])]
    return [image_batch(4, {"smile": smile, "age": smile}, seed) for seed, smile in enumerate(smiles)]


class Faces(L.LightningDataModule, LabelledImages):
    """Batches with the names of their classes."""

    def __init__(self, batches: Sequence[ImageBatch], class_names: dict[str, tuple[str, ...]] | None = None) -> None:
        super().__init__()
        self.batches, self._class_names = batches, class_names or {}

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        return self._class_names

    def train_dataloader(self) -> Batches:
        return Batches(self.batches)


def targets_of(task: Caso, batch: ImageBatch, first: int = 0) -> EditTargets:
    """What the task chooses for a batch from a position of the training on."""
    latents = task.clean_latents(batch)
    return choose_targets(
        range(first, first + len(latents)),
        present_classes(batch.labels, task.attributes, latents, None),
        num_classes=[2, 3],
        class_counts=[None, None],
        targets=task.targets,
        timesteps=task.editor.timesteps,
        shape=latents.shape[1:],
        seed=task.seed,
    )


def tokens_of(targets: EditTargets) -> list[str]:
    return [TOKENS[2 * attribute + int(k)] for attribute, k in zip(targets.attributes, targets.classes, strict=True)]


def one_step_edits(
    task: Caso, batch: ImageBatch, targets: EditTargets, scale: float = 10.0, concept_scale: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Clean latents, and edits in one step, written out; with a further concept "hat"."""
    clean, edits = task.backbone.encode_images(batch.images), []
    alphas_cumprod = DDPMScheduler.from_config(task.backbone.make_scheduler().config).alphas_cumprod
    for row, token in enumerate(tokens_of(targets)):
        alpha_bar, timestep = alphas_cumprod[targets.timesteps[row]], targets.timesteps[row]
        noisy = alpha_bar.sqrt() * clean[row, None] + (1 - alpha_bar).sqrt() * targets.noise[row, None]
        empty, prompted, concept = (
            task.backbone(noisy, timestep, task.pipeline.encode([prompt])) for prompt in ("", token, "hat")
        )
        noise = empty + scale * (prompted - empty) + concept_scale * (concept - empty)
        edits.append((noisy - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt())
    return clean, torch.cat(edits)


def log_probabilities(task: Caso, images: Tensor, targets: EditTargets) -> Tensor:
    """Of the class that was chosen for each image."""
    values = []
    for logits, attribute, k in zip(task.classifier(images), targets.attributes, targets.classes, strict=True):
        if attribute == 0:  # no smile or smile
            values.append(functional.logsigmoid(logits[0] if k == 1 else -logits[0]))
        else:
            values.append(logits[2:5].log_softmax(dim=0)[k])
    return torch.stack(values)
