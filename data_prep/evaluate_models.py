"""Measure the bundled models on held-out draws and fresh seeds, and write their model cards.

``uv run python -m data_prep.evaluate_models``. All figures of generated images are the judges'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from PIL import Image
from torch import Tensor

from data_prep.portrait_arrays import WORK_FOLDER, PortraitArrays, portrait_arrays
from data_prep.train_classifiers import PERSONA_FREQUENCIES
from tokenlearn.callbacks.images import save_image, sheet, to_image
from tokenlearn.data.portraits import ATTRIBUTES, PERSONAS, STYLES, attribute_prompt, described_persona
from tokenlearn.diffusion import LastK
from tokenlearn.files import atomic_write
from tokenlearn.models import StableDiffusion, TimmClassifier
from tokenlearn.objectives import ClassifierLoss
from tokenlearn.pipeline import Pipeline, Sampling
from tokenlearn.training.word_search import WordSearch, find_words

_HELD_OUT_SEED = 424242
_FIRST_IMAGE_SEED = 77_000
_STEPS, _GUIDANCE = 20, 7.5
_STYLE_PROMPTS = {
    "photo": "a photo of a smiling woman with glasses",
    "sketch": "a pencil sketch of a smiling woman with glasses",
    "painting": "a painting of a smiling woman with glasses",
    "night": "a night photo of a smiling woman with glasses",
    "old photograph": "an old photograph of a smiling woman with glasses",
}


@torch.no_grad()
def generate(pipeline: Pipeline, prompt: str, count: int) -> Tensor:
    """``count`` images of one prompt with seeds that nothing else uses, (count, 3, 64, 64) in [0, 1]."""
    seeds = [_FIRST_IMAGE_SEED + index for index in range(count)]
    return pipeline.generate([prompt] * count, seeds).clamp(0, 1)


def best_words(pipeline: Pipeline, guide: Path) -> dict[str, str]:
    """The best single word of the vocabulary for each persona, by its guide."""
    return find_words(
        pipeline,
        ClassifierLoss(str(guide)),
        list(PERSONAS),
        "a portrait of a {}",
        search=WordSearch(words=10_000),  # more than there are, so that all are tried
        gradient=LastK(1),
    )


@torch.no_grad()
def reconstruction_psnr(backbone: StableDiffusion, arrays: PortraitArrays) -> float:
    """Mean PSNR in dB of the autoencoder's round trip."""
    values = []
    for start in range(0, len(arrays.captions), 100):
        pixels = arrays.pixels(list(range(start, min(start + 100, len(arrays.captions)))))
        decoded = backbone.decode_latents(backbone.encode_images(pixels)).clamp(0, 1)
        values.append(-10 * torch.log10((decoded - pixels).square().mean(dim=(1, 2, 3))))
    return float(torch.cat(values).mean())


@torch.no_grad()
def classifier_accuracy(classifier: TimmClassifier, arrays: PortraitArrays) -> dict[str, float]:
    """Accuracy per label on drawn portraits."""
    logits = torch.cat(
        [
            classifier(arrays.pixels(list(range(start, min(start + 200, len(arrays.captions))))))
            for start in range(0, len(arrays.captions), 200)
        ]
    )
    if classifier.multi_label:
        known = arrays.labels_known.float()
        correct = (((logits > 0) == arrays.labels) * known).sum(dim=0) / known.sum(dim=0)
        return dict(zip(classifier.label_names, correct.tolist(), strict=True))
    right = (logits.argmax(dim=1) == arrays.personas).float()
    return {name: float(right[arrays.personas == index].mean()) for index, name in enumerate(classifier.label_names)}


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _write_card(folder: Path, title: str, text: str) -> None:
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(f"---\nlicense: apache-2.0\n---\n# {title}\n\n{text}\n")


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def evaluate_classifiers(checkpoints: Path, size: int, work_folder: Path) -> None:
    """Measure the four classifiers on ``size`` portraits of a stream as in training, and write their cards."""
    streams = {
        "attribute": portrait_arrays(size, _HELD_OUT_SEED, work_folder),
        "persona": portrait_arrays(size, _HELD_OUT_SEED, work_folder, frequencies=PERSONA_FREQUENCIES),
    }
    personas = PERSONA_FREQUENCIES["persona_frequency"]
    near_misses = (1 - personas) * PERSONA_FREQUENCIES["near_miss_frequency"]
    mixtures = {
        "attribute": "",
        "persona": f" ({100 * personas:.0f} % personas, {100 * near_misses:.0f} % people who lack one part of a "
        "persona, and ordinary people)",
    }
    training = {
        "guide": "a small resnet10t, trained on drawn portraits, their autoencoder round trips and one-step "
        "predictions of the diffusion model from noisy latents, so that it can guide through blurred predictions",
        "judge": "a regnetx_002, trained on other portraits than the guide, as drawn and after the autoencoder's "
        "round trip. It only reports and must never be optimised against",
    }
    for name in ("attribute_guide", "attribute_judge", "persona_guide", "persona_judge"):
        subject, role = name.split("_")
        arrays = streams[subject]
        accuracy = classifier_accuracy(TimmClassifier(str(checkpoints / name)), arrays)
        rows = [(label, f"{value:.1%}") for label, value in accuracy.items()]
        table = _table(("label", "accuracy"), [*rows, ("mean", f"{_mean(accuracy):.1%}")])
        text = f"A timm classifier of portraits: {training[role]}.\n\n"
        text += f"On {len(arrays.captions)} held-out drawn portraits{mixtures[subject]}:\n\n{table}"
        _write_card(checkpoints / name, f"Portraits: {name.replace('_', ' ')}", text)
        print(f"{name}: {_mean(accuracy):.2%}, worst {min(accuracy.values()):.2%}", flush=True)


def evaluate_pipeline(checkpoints: Path, arrays: PortraitArrays, images: int) -> None:
    """Judge ``images`` generated images of each prompt; write the pipeline's card and its sheet of samples."""
    backbone = StableDiffusion(str(checkpoints / "portraits"))
    psnr = reconstruction_psnr(backbone, arrays)
    print(f"autoencoder: {psnr:.2f} dB", flush=True)
    pipeline = Pipeline(backbone, sampling=Sampling(steps=_STEPS, guidance=_GUIDANCE))
    attribute_judge = TimmClassifier(str(checkpoints / "attribute_judge"))
    persona_judge = TimmClassifier(str(checkpoints / "persona_judge"))
    shown: list[tuple[str, list[Image.Image]]] = []
    present: dict[str, float] = {}
    for index, name in enumerate(ATTRIBUTES):
        generated = generate(pipeline, attribute_prompt(name), images)
        present[name] = float((attribute_judge(generated)[:, index] > 0).float().mean())
        shown.append((name, [to_image(image) for image in generated[:10]]))
        print(f"{name}: {present[name]:.1%}", flush=True)
    words = best_words(pipeline, checkpoints / "persona_guide")
    described: dict[str, float] = {}
    named: dict[str, float] = {}
    by_word: dict[str, float] = {}
    for index, name in enumerate(PERSONAS, start=1):
        for prompt, shares in (
            (f"a portrait of a {described_persona(name)}", described),
            (f"a portrait of a {name}", named),
            (f"a portrait of a {words[name]} {name}", by_word),
        ):
            generated = generate(pipeline, prompt, images)
            shares[name] = float((persona_judge(generated).argmax(dim=1) == index).float().mean())
            if shares is described:
                shown.append((name, [to_image(image) for image in generated[:10]]))
        figures = f"by name {named[name]:.1%}, by '{words[name]}' {by_word[name]:.1%}"
        print(f"{name}: described {described[name]:.1%}, {figures}", flush=True)
    for style in STYLES:
        generated = generate(pipeline, _STYLE_PROMPTS[style], 10)
        shown.append((style, [to_image(image) for image in generated]))
    save_image(sheet(shown), checkpoints / "portraits" / "samples.png")

    parts = [
        "A Stable Diffusion pipeline of a small procedural world, 64 x 64 pixels, trained on two CPU cores by the "
        "scripts in `data_prep/`. Network and text encoder were trained on from those of an earlier world, for 7700 "
        "steps of which the last 2500 were on this world; the autoencoder is the earlier one. It exists so that every "
        "method can be tried and tested in minutes.",
        "![generated images](samples.png)",
        f"Autoencoder: {psnr:.1f} dB PSNR on {len(arrays.captions)} held-out portraits.",
        f"{images} images per prompt, {_STEPS} DDIM steps, guidance scale {_GUIDANCE}, judged by `attribute_judge` "
        "and `persona_judge`.",
        _table(
            ("prompted attribute", "present"),
            [*((name, f"{value:.0%}") for name, value in present.items()), ("mean", f"{_mean(present):.1%}")],
        ),
        _table(
            ("persona", "described by its parts", "by its name alone", "by one word before its name", "word"),
            [
                *(
                    (name, f"{described[name]:.0%}", f"{named[name]:.0%}", f"{by_word[name]:.0%}", words[name])
                    for name in PERSONAS
                ),
                ("mean", f"{_mean(described):.1%}", f"{_mean(named):.1%}", f"{_mean(by_word):.1%}", ""),
            ],
        ),
        "The word is the one of the vocabulary whose images `persona_guide` finds most like the persona, by a search "
        "on other seeds.",
    ]
    _write_card(checkpoints / "portraits", "Portraits: text to image", "\n\n".join(parts))
    print(
        f"attributes: mean {_mean(present):.1%}, worst {min(present.values()):.1%}; "
        f"personas: described {_mean(described):.1%}, by name {_mean(named):.1%}, by word {_mean(by_word):.1%}"
    )


def main(
    checkpoints: Path = Path("checkpoints"),
    images: int = 32,
    held_out: int = 2000,
    work_folder: Path = WORK_FOLDER,
    only: Literal["classifiers", "pipeline"] | None = None,
) -> None:
    """Measure the models, and write the cards and the sheet of samples.

    Args:
        checkpoints: folder of the bundled models.
        images: generated images per prompt.
        held_out: drawn portraits, of a stream that no training saw.
        work_folder: where renderings are kept.
        only: the models to measure; null for all.
    """
    if only != "pipeline":
        evaluate_classifiers(checkpoints, held_out, work_folder)
    if only != "classifiers":
        evaluate_pipeline(checkpoints, portrait_arrays(held_out, _HELD_OUT_SEED, work_folder), images)


if __name__ == "__main__":
    auto_cli(main)
