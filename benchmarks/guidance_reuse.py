"""Semantic guidance of one prompt reused for others: ``uv run python benchmarks/guidance_reuse.py``.

SEGA (section 4, https://arxiv.org/abs/2301.12247) says that the guidance by a concept is nearly the same for all
prompts that start from the same noise. The guidance is recorded for one prompt, and applied to other prompts at the
same seed and, as a control, at the next one. Beside it are the images without guidance and with guidance of their own,
which evaluates the concept. A judge counts the images that show the concept.

The table has a row per prompt. ``figure.png`` of the output folder has a row of images for each prompt and way. The
last line is JSON: the share of all images that show the concept, by way, with its 95 % Wilson interval.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from tokenlearn.callbacks.images import save_image, sheet
from tokenlearn.errors import UserError
from tokenlearn.guidance import SEGA, RecordedGuidance, SemanticEdit
from tokenlearn.metrics import wilson_interval
from tokenlearn.objectives import ClassifierLoss
from tokenlearn.pipeline import Pipeline, Sampling, finished, to_images

WAYS = ("plain", "own guidance", "reused", "reused, other seed")
"""No guidance; guidance of the prompt itself; that of the first prompt at the same seed; and at the next seed."""
_COLUMNS = 8


def images_by_way(
    pipeline: Pipeline, recorded_for: str, prompts: Sequence[str], seeds: Sequence[int], edit: SemanticEdit
) -> dict[str, dict[str, Tensor]]:
    """Prompt to way to images (S, 3, H, W) in [0, 1] of S seeds.

    Args:
        pipeline: frozen model with the settings of the sampler.
        recorded_for: prompt that the guidance is recorded for.
        prompts: other prompts.
        seeds: S seeds, at least two.
        edit: the concept.
    """
    scale = pipeline.sampling.guidance
    assert isinstance(scale, int | float)
    source = pipeline.encode([recorded_for] * len(seeds))
    model = pipeline.guided_model(source, SEGA([edit], scale, record=True))
    pipeline.sample_latents(seeds, model)
    assert isinstance(model.rule, SEGA)
    vectors = model.rule.recorded
    rules = {
        "own guidance": SEGA([edit], scale),
        "reused": RecordedGuidance(scale, vectors),
        "reused, other seed": RecordedGuidance(scale, vectors.roll(-1, dims=1)),
    }
    return {
        prompt: {way: finished(pipeline.generate([prompt] * len(seeds), seeds, rule=rules.get(way))) for way in WAYS}
        for prompt in prompts
    }


def main(
    concept: str = "glasses",
    label: str = "glasses",
    recorded_for: str = "a portrait of a person",
    prompts: tuple[str, ...] = (
        "a portrait of a king",
        "a portrait of a woman with curly hair",
        "a sketch of a bald man",
        "a painting of a person with a hat",
    ),
    pretrained: str = "checkpoints/portraits",
    judge: str = "checkpoints/attribute_judge",
    first_seed: int = 5000,
    seeds: int = 24,
    batch_size: int = 8,
    steps: int = 20,
    guidance: float = 7.5,
    scale: float = 8.0,
    threshold: float = 0.9,
    output_dir: str = "outputs/guidance_reuse",
) -> None:
    """Generate, judge and draw all images.

    Args:
        concept: concept of the guidance.
        label: label of the judge that it should add.
        recorded_for: prompt that the guidance is recorded for.
        prompts: prompts that it is reused for.
        pretrained: model.
        judge: multi-label classifier that guides nothing.
        first_seed: first seed.
        seeds: number of seeds.
        batch_size: seeds at once, at least two; a batch's guidance is reused within the batch.
        steps: sampling steps.
        guidance: scale of classifier-free guidance.
        scale: scale of the concept.
        threshold: share of elements that the concept leaves alone.
        output_dir: folder of the figure.

    Raises:
        UserError: if a batch has fewer than two seeds, or a name is unknown.
    """
    if batch_size < 2 or seeds % batch_size == 1:
        raise UserError(f"a batch needs two seeds, got batch_size {batch_size} for {seeds} seeds; change one of them")
    pipeline = Pipeline.from_pretrained(pretrained, sampling=Sampling(steps=steps, guidance=guidance))
    judging = ClassifierLoss(judge, labels=label)
    edit = SemanticEdit(
        concept=concept, scale=scale, threshold=threshold, warmup_steps=1, momentum_scale=0.3, momentum_beta=0.6
    )
    images: dict[str, dict[str, list[Tensor]]] = {prompt: {way: [] for way in WAYS} for prompt in prompts}
    numbers = range(first_seed, first_seed + seeds)
    for start in tqdm(range(0, seeds, batch_size), desc="Batches", unit="batch"):
        made = images_by_way(pipeline, recorded_for, prompts, numbers[start : start + batch_size], edit)
        for prompt, of_prompt in made.items():
            for way, of_way in of_prompt.items():
                images[prompt][way].append(of_way)
    shown = {
        prompt: {way: judging.score(torch.cat(parts)).tolist() for way, parts in of_prompt.items()}
        for prompt, of_prompt in images.items()
    }
    rows = [
        (f"{prompt}: {way}", to_images(torch.cat(parts)[:_COLUMNS]))
        for prompt, of_prompt in images.items()
        for way, parts in of_prompt.items()
    ]
    figure = Path(output_dir).expanduser() / "figure.png"
    save_image(sheet(rows), figure)
    print_table(shown)
    print(figure)
    print(json.dumps(summary(shown)))


def summary(shown: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Way to the share of all images that show the concept, and its interval.

    Args:
        shown: prompt to way to 1 for each image that shows it, else 0.
    """
    figures: dict[str, Any] = {}
    for way in WAYS:
        of_way = [value for of_prompt in shown.values() for value in of_prompt[way]]
        low, high = wilson_interval(round(sum(of_way)), len(of_way))
        figures[way] = {
            "share": round(sum(of_way) / len(of_way), 4),
            "interval": [round(low, 4), round(high, 4)],
            "images": len(of_way),
        }
    return figures


def print_table(shown: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Print a row per prompt."""
    width = max(map(len, shown))
    line = f"{{:<{width}}}" + " {:>18}" * len(WAYS)
    print(line.format("prompt", *WAYS))
    for prompt, of_prompt in shown.items():
        print(line.format(prompt, *(f"{sum(of_prompt[way]) / len(of_prompt[way]):.0%}" for way in WAYS)))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    auto_cli(main)
