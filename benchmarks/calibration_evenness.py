"""How evenly tokens change images before and after calibration: ``uv run python benchmarks/calibration_evenness.py``.

Each token is calibrated as ``tokenlearn calibrate`` does it, on some of the images. It is measured on these in the
same classifier's features, as the command prints it, and on other images in a judge's features: at nine equally
spaced strengths of its range, and at nine equal steps of the calibrated strength. Unevenness is the coefficient of
variation of the perceptual distances between neighbours, 0 for equal steps. The last line is JSON: ``before`` and
``after`` on the other images, means over tokens, ``ratio``, after over before, and ``halved``, the share of tokens
whose unevenness falls to half or less; and the same on the calibration's own images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from jsonargparse import auto_cli
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from tokenlearn.calibration import calibrate, measure_unevenness
from tokenlearn.data.portraits import STYLES, portraits_dataset
from tokenlearn.editing import Editing
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.models import TimmClassifier
from tokenlearn.pipeline import Pipeline


def main(
    embeddings: str = "checkpoints/attribute_tokens",
    pretrained: str = "checkpoints/portraits",
    images: str | None = None,
    calibrated_on: int = 12,
    measured_on: int = 12,
    classifier: str = "checkpoints/attribute_guide",
    judge: str = "checkpoints/attribute_judge",
    strengths: tuple[float, float] = (0.0, 6.0),
    points: int = 13,
    tokens: tuple[str, ...] = (),
) -> None:
    """Calibrate and measure every token of a folder, and print the table.

    Args:
        embeddings: folder of embedding files, or one file.
        pretrained: model of the tokens.
        images: folder of images to edit; None for drawn photos of ordinary people, which no model was trained on.
        calibrated_on: number of images, the first by name, that calibrations use.
        measured_on: number of images after these that measure.
        classifier: frozen classifier in whose features calibrations compare images.
        judge: another one, in whose features the result is measured.
        strengths: lowest and highest strength of the calibration.
        points: strengths of its grid.
        tokens: tokens to look at; none for all of the folder.

    Raises:
        UserError: if there are too few images, or a token is not in the folder.
    """
    check_at_least("calibration_evenness", 1, calibrated_on=calibrated_on, measured_on=measured_on)
    number = calibrated_on + measured_on
    found = drawn_photos(number) if images is None else sorted(Path(images).glob("*.png"))[:number]
    used, others = found[:calibrated_on], found[calibrated_on:]
    if len(found) < number:
        raise UserError(
            f"'{images}' has {len(found)} images and {number} are needed; lower calibrated_on or measured_on"
        )
    pipeline = Pipeline.from_pretrained(pretrained, tokens=embeddings)
    assert pipeline.tokens is not None
    known = pipeline.tokens.placeholders
    if missing := set(tokens) - set(known):
        raise UserError(f"'{min(missing)}' is no token of '{embeddings}'; known are {', '.join(known)}")
    editing = Editing(timestep=801, steps=20, inversion="edit_friendly")
    guiding, judging = TimmClassifier(classifier), TimmClassifier(judge)
    own, held_out = {}, {}
    for token in tqdm(tokens or known, desc="Tokens", unit="token"):
        calibration = calibrate(
            pipeline, token, used, classifier=guiding, strengths=strengths, points=points, editing=editing
        )
        assert calibration.unevenness is not None
        own[token] = calibration.unevenness
        held_out[token] = measure_unevenness(pipeline, token, calibration, others, classifier=judging, editing=editing)
    line = "{:<16} {:>7} {:>7} {:>11} {:>7}"
    print(line.format("token", "before", "after", "own: before", "after"))
    for token in held_out:
        print(line.format(token, *(f"{value:.3f}" for value in (*held_out[token], *own[token]))))
    print(json.dumps(summary(held_out) | {"own": summary(own)}))


def drawn_photos(number: int) -> list[Image.Image]:
    """Photos of ordinary people, of a stream that no model was trained on."""
    rows = portraits_dataset(100 * number, seed=11, streaming=True)
    photos = (row["image"] for row in rows if row["style"] == STYLES.index("photo") and row["parts"] == 0)
    return list(islice(photos, number))


def summary(of_tokens: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Means over tokens of their unevenness before and after calibration, their ratio, and the share it halves."""
    before, after = (mean(column) for column in zip(*of_tokens.values(), strict=True))
    halved = mean(float(later <= 0.5 * earlier) for earlier, later in of_tokens.values())
    return {
        "before": round(before, 4),
        "after": round(after, 4),
        "ratio": round(after / before, 4),
        "halved": round(halved, 4),
    }


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    auto_cli(main)
