"""How evenly tokens change images before and after calibration: ``uv run python benchmarks/calibration_evenness.py``.

Each token is calibrated as ``tokenlearn calibrate`` does it, on some of the images, and measured on the others: at
nine equally spaced strengths of its range, and at nine equal steps of the calibrated strength. Unevenness is the
coefficient of variation of the perceptual distances between neighbours, 0 for equal steps. The last line is JSON:
``before`` and ``after``, means over tokens, ``ratio``, after over before, and ``halved``, the share of tokens whose
unevenness falls to half or less.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import torch
from jsonargparse import auto_cli
from tqdm import tqdm  # type: ignore[import-untyped]

from tokenlearn.calibration import calibrate, measure_unevenness
from tokenlearn.editing import Editing
from tokenlearn.errors import UserError
from tokenlearn.models import TimmClassifier
from tokenlearn.pipeline import Pipeline


def main(
    embeddings: str = "checkpoints/attribute_tokens",
    pretrained: str = "checkpoints/portraits",
    images: str = "configs/portraits/images/photographs",
    calibrated_on: int = 4,
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
        images: folder of images to edit.
        calibrated_on: number of images, the first by name, that calibrations use; the others measure.
        classifier: frozen classifier in whose features calibrations compare images.
        judge: another one, in whose features the result is measured.
        strengths: lowest and highest strength of the calibration.
        points: strengths of its grid.
        tokens: tokens to look at; none for all of the folder.

    Raises:
        UserError: if there are no images to measure with, or a token is not in the folder.
    """
    files = sorted(path for path in Path(images).iterdir() if path.suffix == ".png")
    used, others = files[:calibrated_on], files[calibrated_on:]
    if not used or not others:
        raise UserError(f"'{images}' has {len(files)} images; calibrated_on {calibrated_on} must leave some of them")
    pipeline = Pipeline.from_pretrained(pretrained, tokens=embeddings)
    assert pipeline.tokens is not None
    known = pipeline.tokens.placeholders
    if missing := set(tokens) - set(known):
        raise UserError(f"'{min(missing)}' is no token of '{embeddings}'; known are {', '.join(known)}")
    editing = Editing(timestep=801, steps=20, inversion="edit_friendly")
    guiding, judging = TimmClassifier(classifier), TimmClassifier(judge)
    found = {}
    for token in tqdm(tokens or known, desc="Tokens", unit="token"):
        calibration = calibrate(
            pipeline, token, used, classifier=guiding, strengths=strengths, points=points, editing=editing
        )
        found[token] = measure_unevenness(pipeline, token, calibration, others, classifier=judging, editing=editing)
    print(f"{'token':<16} {'before':>7} {'after':>7}")
    for token, (before, after) in found.items():
        print(f"{token:<16} {before:>7.3f} {after:>7.3f}")
    before, after = (mean(column) for column in zip(*found.values(), strict=True))
    halved = mean(float(later <= 0.5 * earlier) for earlier, later in found.values())
    print(
        json.dumps(
            {"before": round(before, 4), "after": round(after, 4), "ratio": round(after / before, 4), "halved": halved}
        )
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    auto_cli(main)
