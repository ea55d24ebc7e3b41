"""Cost of semantic guidance beside diffusers' pipeline: ``uv run python benchmarks/sega_speed.py``.

Two implementations are measured in one run, in turns so that other work on the machine affects both alike:

``ours``
    :func:`tokenlearn.diffusion.sample` under :class:`tokenlearn.guidance.SemanticGuidance`, with everything around it:
    prompts are tokenised and encoded, latents sampled, images decoded.
``diffusers``
    ``SemanticStableDiffusionPipeline`` with the same weights in memory, prompts, noise, scheduler, steps, guidance and
    settings of the concepts. Quantiles are per channel and all concepts share their warm-up, where both
    implementations give the same images; the largest difference is printed.

Three cases: one concept and four with momentum, for which every concept has to be evaluated at every step, and four
without, for which ours leaves the concepts out during the warm-up.

A ratio is ours over diffusers': of times the median over rounds of the ratio within one round, of peak memory the
ratio of one run each. Peak memory is the most that is allocated at once beyond the weights, see
:mod:`benchmarks.memory`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Literal

import torch
from diffusers import SemanticStableDiffusionPipeline
from jsonargparse import auto_cli
from lightning.fabric import Fabric
from torch import Tensor

from benchmarks.common import take_turns
from benchmarks.memory import peak_bytes
from tokenlearn.diffusion import sample
from tokenlearn.errors import UserError
from tokenlearn.guidance import Concept, ConceptSettings, GuidedModel, SemanticGuidance
from tokenlearn.models import StableDiffusion

FEW, MANY = 1, 4
_MIB = 2**20


class Ours:
    """Images of a prompt under semantic guidance by concepts that share their settings.

    Args:
        backbone: the model.
        prompt: prompt of all images.
        concepts: prompts of one term each.
        settings: settings of all concepts.
        noise: (B, C, h, w) initial latents.
        steps: sampling steps.
        guidance_scale: scale of the prompt.

    Attributes:
        images: (B, 3, H, W) in [0, 1], the last images.
    """

    images: Tensor

    def __init__(
        self,
        backbone: StableDiffusion,
        prompt: str,
        concepts: Sequence[str],
        settings: ConceptSettings,
        noise: Tensor,
        steps: int,
        guidance_scale: float,
    ) -> None:
        self.backbone, self.prompts, self.noise, self.steps = backbone, ["", prompt, *concepts], noise, steps
        self.rule = SemanticGuidance(guidance_scale, [Concept(settings)] * len(concepts), "channel")

    @torch.no_grad()
    def __call__(self) -> None:
        """Make the images."""
        encoded = self.backbone.encode_prompts(self.prompts)
        rows = [encoded[index : index + 1] for index in range(len(encoded))]
        model = GuidedModel(self.backbone, self.rule, self.rule.conditionings(rows[0], rows[1], *rows[2:]))
        latents = sample(model, self.noise, solver=self.backbone.make_solver(None, self.steps))
        self.images = self.backbone.decode_latents(latents).clamp(0, 1)


class Theirs:
    """The same images by diffusers' pipeline; arguments and attribute as of :class:`Ours`."""

    images: Tensor

    def __init__(
        self,
        backbone: StableDiffusion,
        prompt: str,
        concepts: Sequence[str],
        settings: ConceptSettings,
        noise: Tensor,
        steps: int,
        guidance_scale: float,
    ) -> None:
        self.pipeline = semantic_pipeline(backbone)
        self.options = {
            "prompt": [prompt] * len(noise),
            "latents": noise,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "editing_prompt": list(concepts),
            "edit_guidance_scale": settings.scale,
            "edit_threshold": settings.threshold,
            "edit_warmup_steps": settings.warmup_steps,
            "edit_momentum_scale": settings.momentum_scale,
            "edit_mom_beta": settings.momentum_beta,
            "output_type": "pt",
        }

    def __call__(self) -> None:
        """Make the images."""
        self.images = self.pipeline(**self.options).images


def semantic_pipeline(backbone: StableDiffusion) -> Any:  # noqa: ANN401 - diffusers' pipelines have no usable types
    """The semantic pipeline of diffusers around the parts of the backbone."""
    pipeline_class: Any = SemanticStableDiffusionPipeline
    pipeline = pipeline_class(
        vae=backbone.vae,
        text_encoder=backbone.text_encoders[0],
        tokenizer=backbone.tokenizers[0],
        unet=backbone.unet,
        scheduler=backbone.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(
    pipeline: str = "checkpoints/portraits",
    prompt: str = "a portrait of a man",
    concepts: tuple[str, ...] = ("glasses", "smiling", "a hat", "a beard"),
    steps: int = 20,
    guidance_scale: float = 4.0,
    scale: float = 5.0,
    threshold: float = 0.9,
    warmup_share: float = 0.2,
    momentum_scale: float = 0.3,
    momentum_beta: float = 0.6,
    batch_size: int = 4,
    repetitions: int = 5,
    threads: int | None = None,
    accelerator: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Measure, print a table, and as the last line the ratios as JSON.

    Args:
        pipeline: folder or hub id of the diffusion model.
        prompt: prompt of the images.
        concepts: four concepts to add.
        steps: sampling steps.
        guidance_scale: scale of the prompt, above 1, because diffusers ignores concepts at 1.
        scale: scale of the concepts.
        threshold: threshold of the concepts.
        warmup_share: share of the steps that are warm-up.
        momentum_scale: momentum of the concepts, in the cases with momentum.
        momentum_beta: decay of the momentum.
        batch_size: images at once.
        repetitions: rounds.
        threads: threads of the CPU; null for torch's choice.
        accelerator: accelerator as of the Trainer.

    Raises:
        UserError: if there are not four concepts, or the guidance scale is not above 1.
    """
    if len(concepts) != MANY:
        raise UserError(f"concepts must be {MANY}, got {len(concepts)}")
    if guidance_scale <= 1:
        raise UserError(f"guidance_scale must be above 1, got {guidance_scale}; diffusers ignores concepts at 1")
    if threads is not None:
        torch.set_num_threads(threads)
    device = Fabric(accelerator=accelerator, devices=1).device
    backbone = StableDiffusion(pipeline).to(device)
    noise = backbone.initial_latents(range(batch_size))
    with_momentum = ConceptSettings(
        scale, threshold, round(warmup_share * steps), momentum_scale=momentum_scale, momentum_beta=momentum_beta
    )
    without = ConceptSettings(scale, threshold, with_momentum.warmup_steps, momentum_scale=0.0)

    results: dict[str, float] = {}
    line = "{:>8}  {:<8}  {:<10} {:>17} {:>9} {:>12}"
    print(f"{pipeline}, {batch_size} images at once, {steps} steps, {device}, {torch.get_num_threads()} threads")
    print(line.format("concepts", "momentum", "", "seconds an image", "peak MiB", "difference"))
    for key, count, settings in (
        ("one", FEW, with_momentum),
        ("four", MANY, with_momentum),
        ("four_no_momentum", MANY, without),
    ):
        arguments = (backbone, prompt, concepts[:count], settings, noise, steps, guidance_scale)
        ours, theirs = Ours(*arguments), Theirs(*arguments)
        makers: list[Callable[[], None]] = [ours, theirs]
        for make in makers:
            make()  # warms up
        difference = (ours.images - theirs.images).abs().max().item()
        peaks = [peak_bytes(make, device) for make in makers]
        rounds = take_turns(makers, repetitions, device)
        momentum = "yes" if settings.momentum_scale > 0 else "no"
        for index, name in enumerate(("ours", "diffusers")):
            seconds = median(turn[index] for turn in rounds) / batch_size
            print(
                line.format(count, momentum, name, f"{seconds:.4f}", f"{peaks[index] / _MIB:.2f}", f"{difference:.1e}")
            )
        results[f"time_{key}"] = median(turn[0] / turn[1] for turn in rounds)
        results[f"memory_{key}"] = peaks[0] / peaks[1]
    print(json.dumps({key: round(value, 4) for key, value in results.items()}))


if __name__ == "__main__":
    auto_cli(main)
