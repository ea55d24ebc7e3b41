"""Train the bundled classifiers: ``uv run python -m data_prep.train_classifiers attribute_judge``.

Guides and judges differ in architecture, seed and training portraits. All of them see portraits as drawn and as the
autoencoder gives them back; the guides also see one-step predictions of the diffusion model from noisy latents, so
that the blur of a prediction does not fool them. Guides thus need the diffusion model, judges only the autoencoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
from diffusers import AutoencoderKL
from jsonargparse import auto_cli
from torch import Tensor
from torch.nn import functional

from data_prep.portrait_arrays import PORTRAIT_LABELS, WORK_FOLDER, PortraitArrays, index_loader, portrait_arrays
from data_prep.training import TrainedBySteps, train
from tokenlearn.data.portraits import IMAGE_SIZE, PERSONA_LABELS, Scene, sample_scene
from tokenlearn.losses import class_cross_entropy
from tokenlearn.models import StableDiffusion
from tokenlearn.models.classifier import save_classifier
from tokenlearn.pipeline import Pipeline, Sampling

GUIDE_SEED, JUDGE_SEED = 0, 1000
_DATA_CONFIG = {
    "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}
_GUIDE_ARGUMENTS = {"channels": (32, 64, 128, 256)}
_ONE_STEP_TIMESTEPS = (50, 1000)
_ONE_STEP_GUIDANCE = (1.0, 3.0, 7.5)
PERSONA_FREQUENCIES = {"persona_frequency": 0.3, "near_miss_frequency": 0.4}
"""Persona classifiers see more personas than the world has, and people who lack one part of a persona."""

Name = Literal["attribute_guide", "attribute_judge", "persona_guide", "persona_judge"]


class ClassifierTraining(TrainedBySteps):
    """Cross-entropy on augmented images; independent sigmoids for attributes."""

    def __init__(
        self, arrays: PortraitArrays, seen: list[Tensor], name: Name, steps: int, learning_rate: float
    ) -> None:
        super().__init__(steps, learning_rate, weight_decay=0.02)
        self.arrays, self.seen = arrays, seen
        self.multi_label = name.startswith("attribute")
        labels = PORTRAIT_LABELS if self.multi_label else PERSONA_LABELS
        self.is_guide = name.endswith("guide")
        if self.is_guide:
            self.model = timm.create_model("resnet10t", num_classes=len(labels), **_GUIDE_ARGUMENTS)
        else:
            self.model = timm.create_model("regnetx_002", num_classes=len(labels))

    def training_step(self, indices: Tensor) -> Tensor:
        """One batch; each image as drawn or in one of the other forms in which it is known."""
        pixels = self.arrays.pixels(indices)
        for form in self.seen:
            replaced = (torch.rand(len(indices)) < 0.4) & (indices < len(form))
            pixels[replaced] = form[indices[replaced]].float() / 255
        logits = self.model(_augment(pixels) * 2 - 1)
        if self.multi_label:
            known = self.arrays.labels_known[indices]
            targets = self.arrays.labels[indices].float()
            loss = functional.binary_cross_entropy_with_logits(logits.float()[known], targets[known])
        else:
            loss = class_cross_entropy(logits.float(), self.arrays.personas[indices], multi_label=False).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def save(self, folder: Path) -> None:
        """Write the classifier to a folder."""
        labels = PORTRAIT_LABELS if self.multi_label else PERSONA_LABELS
        arguments = _GUIDE_ARGUMENTS if self.is_guide else None
        save_classifier(self.model.eval(), folder, labels, self.multi_label, _DATA_CONFIG, arguments)


def _augment(pixels: Tensor) -> Tensor:
    """Shift by up to 3 pixels, change brightness and contrast, add a little noise."""
    down, right = (int(offset) for offset in torch.randint(-3, 4, (2,)))
    shifted = functional.pad(pixels, (3, 3, 3, 3), mode="replicate")[..., 3 + down : 67 + down, 3 + right : 67 + right]
    contrast = 1 + 0.3 * (torch.rand(len(pixels), 1, 1, 1) - 0.5)
    brightness = 0.16 * (torch.rand(len(pixels), 1, 1, 1) - 0.5)
    noise = 0.03 * torch.rand(len(pixels), 1, 1, 1) * torch.randn_like(pixels)
    return ((shifted - 0.5) * contrast + 0.5 + brightness + noise).clamp(0, 1)


def _as_bytes(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


@torch.no_grad()
def round_trips(vae: AutoencoderKL, arrays: PortraitArrays, size: int) -> Tensor:
    """The first ``size`` portraits as the autoencoder gives them back, uint8 (size, 3, 64, 64)."""
    parts = []
    for start in range(0, size, 200):
        pixels = arrays.pixels(list(range(start, min(start + 200, size))))
        decoded = vae.decode(vae.encode(pixels * 2 - 1).latent_dist.mode()).sample
        parts.append(_as_bytes(decoded / 2 + 0.5))
    return torch.cat(parts)


@torch.no_grad()
def one_step_predictions(backbone: StableDiffusion, arrays: PortraitArrays, prompts: list[str]) -> Tensor:
    """The first portraits as predicted in one step from a random timestep, uint8 (len(prompts), 3, 64, 64).

    Each batch is predicted at one of the scales of guidance that tokens are learned at.
    """
    parts = []
    generator = torch.Generator().manual_seed(0)
    for batch, start in enumerate(range(0, len(prompts), 100)):
        rows = list(range(start, min(start + 100, len(prompts))))
        guidance = _ONE_STEP_GUIDANCE[batch % len(_ONE_STEP_GUIDANCE)]
        pipeline = Pipeline(backbone, sampling=Sampling(guidance=guidance))
        latents = backbone.encode_images(arrays.pixels(rows))
        timesteps = torch.randint(*_ONE_STEP_TIMESTEPS, (len(rows),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = backbone.process.add_noise(latents, noise, timesteps)
        model = pipeline.guided_model(pipeline.encode([prompts[row] for row in rows]))
        predicted = backbone.process.x0(noisy, model(noisy, timesteps, 0), timesteps)
        parts.append(_as_bytes(backbone.decode_latents(predicted)))
    return torch.cat(parts)


def all_parts_named(seed: int, size: int, frequencies: Mapping[str, float] | None) -> list[str]:
    """Prompts that name every part of each of the first portraits, so that a prediction shows all or none of them."""
    scenes = (sample_scene(np.random.default_rng([seed, index]), **(frequencies or {})) for index in range(size))
    return [all_parts_prompt(scene) for scene in scenes]


def all_parts_prompt(scene: Scene) -> str:
    """A prompt that names every part of a scene."""
    noun = "woman" if scene.has("female") else "man"
    parts = f" with {', '.join(scene.parts_in_order)}" if scene.parts else ""
    return f"a portrait of a {noun}{parts}"


def _cached(path: Path, make: Callable[[], Tensor]) -> Tensor:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(make(), path)
    return torch.load(path, weights_only=True)


def main(
    name: Name,
    steps: int = 2200,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    size: int = 20000,
    blurred: int = 8000,
    pipeline: str = "checkpoints/portraits",
    work_folder: Path = WORK_FOLDER,
    output_folder: Path = Path("checkpoints"),
) -> None:
    """Train, resume or finish one classifier.

    Args:
        name: which of the four.
        steps: optimizer steps.
        batch_size: portraits per step.
        learning_rate: peak learning rate.
        size: number of rendered portraits to draw from.
        blurred: how many of them are also shown as the autoencoder or the diffusion model give them back.
        pipeline: the diffusion model, for guides.
        work_folder: where renderings and checkpoints are kept.
        output_folder: the classifier is written to a folder of its name in here.
    """
    guide = name.endswith("guide")
    seed = GUIDE_SEED if guide else JUDGE_SEED
    torch.manual_seed(seed + len(name))
    frequencies = PERSONA_FREQUENCIES if name.startswith("persona") else None
    arrays = portrait_arrays(size, seed, work_folder, frequencies=frequencies)
    vae = AutoencoderKL.from_pretrained(work_folder / "autoencoder" / "vae").eval()
    folder = work_folder / "classifiers"
    subject = name.split("_")[0]
    seen = [_cached(folder / f"{subject}-round-trips-{seed}.pt", lambda: round_trips(vae, arrays, blurred))]
    if guide:
        backbone = StableDiffusion(pipeline)
        prompts = all_parts_named(seed, blurred, frequencies) if subject == "persona" else arrays.captions[:blurred]
        seen.append(
            _cached(folder / f"{subject}-one-step.pt", lambda: one_step_predictions(backbone, arrays, prompts))
        )
    module = ClassifierTraining(arrays, seen, name, steps, learning_rate)
    train(module, index_loader(size, batch_size), folder / name, ema_decay=None)
    module.save(output_folder / name)


if __name__ == "__main__":
    auto_cli(main)
