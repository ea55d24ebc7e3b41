"""Calibration of a token: edits of images at many strengths, and the strengths at which equal steps change equally."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenlearn.editing import Editing, ImageEditor, source_of
from tokenlearn.errors import UserError, check_at_least, check_template
from tokenlearn.guidance import check_tokens
from tokenlearn.image_functions import ImageInput, read_images
from tokenlearn.metrics.perceptual_distance import perceptual_distance
from tokenlearn.models import TimmClassifier
from tokenlearn.pipeline import Pipeline
from tokenlearn.tokens import load_embedding
from tokenlearn.tokens.calibration import CALIBRATION, Calibration, calibrate_strengths, unevenness
from tokenlearn.tokens.files import add_metadata


@torch.no_grad()
def calibrate(
    pipeline: Pipeline,
    token: str,
    images: ImageInput,
    *,
    classifier: str | TimmClassifier,
    strengths: tuple[float, float] = (-6.0, 6.0),
    points: int = 25,
    bound: float = 0.5,
    compared: int = 9,
    template: str = "{}",
    editing: Editing = Editing(),  # noqa: B008 - frozen
    batch_size: int = 8,
) -> Calibration:
    """Find the strengths of a token at which equal steps change images equally.

    The distance of two images is the root of :func:`tokenlearn.metrics.perceptual_distance` in the features of a
    classifier's trunk, averaged over the images: the root is a metric, so that lengths of paths add up.

    Args:
        pipeline: frozen model with the token.
        token: the token.
        images: images that are edited: an image, a file, a folder, or several of these.
        classifier: timm name or folder of the frozen classifier.
        strengths: lowest and highest strength to try, with 0 between or at one end.
        points: strengths of the grid, which is made to hold 0. Where the range ends before the lowest or highest
            strength, a second grid of as many points lies within it.
        bound: distance from the unedited image at which the range ends, from 0 to 2.
        compared: strengths at which unevenness is measured, before and after.
        template: prompt with ``{}`` where the token goes.
        editing: settings of inversion and denoising.
        batch_size: images at once.

    Returns:
        The calibration, with the unevenness of equal steps before and after it.

    Raises:
        UserError: if the token is not loaded, an image cannot be read, or a setting is out of range.
    """
    check_at_least("calibrate", 3, points=points, compared=compared)
    check_at_least("calibrate", 1, batch_size=batch_size)
    check_template(template, "template")
    low, high = strengths
    if not low <= 0 <= high or low == high:
        raise UserError(f"strengths must be a range around 0, such as [-6, 6] or [0, 6], got {list(strengths)}")
    edits = _EditsOfToken(pipeline, token, images, classifier, template, editing, batch_size)
    found = edits.calibration((low, high), points, bound)
    reached = found.strengths[0], found.strengths[-1]
    if reached != (low, high):  # the bound is reached before, and few points of the grid are within
        found = edits.calibration(reached, points, bound)
    return dataclasses.replace(found, unevenness=edits.unevenness(found, compared))


@torch.no_grad()
def measure_unevenness(
    pipeline: Pipeline,
    token: str,
    calibration: Calibration,
    images: ImageInput,
    *,
    classifier: str | TimmClassifier,
    compared: int = 9,
    template: str = "{}",
    editing: Editing = Editing(),  # noqa: B008 - frozen
    batch_size: int = 8,
) -> tuple[float, float]:
    """Unevenness of equal steps of a token's strength, and of its calibrated strength, on images of one's choice.

    Args:
        pipeline: frozen model with the token.
        token: the token.
        calibration: of the token.
        images: as of :func:`calibrate`; others than the calibration's show whether it holds for them.
        classifier: as there; another one shows whether it holds for its features.
        compared: strengths, equally spaced over the range of the calibration.
        template: as there.
        editing: as there.
        batch_size: images at once.

    Raises:
        UserError: if the token is not loaded, an image cannot be read, or a setting is out of range.
    """
    check_at_least("measure_unevenness", 3, compared=compared)
    check_template(template, "template")
    edits = _EditsOfToken(pipeline, token, images, classifier, template, editing, batch_size)
    return edits.unevenness(calibration, compared)


class _EditsOfToken:
    """Features of images that a token edits; the arguments are those of :func:`calibrate`."""

    def __init__(
        self,
        pipeline: Pipeline,
        token: str,
        images: ImageInput,
        classifier: str | TimmClassifier,
        template: str,
        editing: Editing,
        batch_size: int,
    ) -> None:
        check_tokens([token], () if pipeline.tokens is None else pipeline.tokens.placeholders)
        found = TimmClassifier(classifier) if isinstance(classifier, str) else classifier
        self.pipeline, self.token, self.template, self.batch_size = pipeline, token, template, batch_size
        self.classifier = found.to(pipeline.backbone.device)
        self.editor = ImageEditor(pipeline.backbone, editing)
        self.source = source_of(pipeline, editing)
        self.inverted = [
            self.editor.invert(pipeline.backbone.encode_images(image.image.to(pipeline.backbone.device)), self.source)
            for image in read_images(images, pipeline.backbone)
            if image.image is not None
        ]

    def features(self, strengths: Sequence[float]) -> list[Tensor]:
        """Features (S, P, F) of each image's edits at S strengths."""
        edits = [{self.token: strength} for strength in strengths]
        found = []
        for inverted in self.inverted:
            edited = self.editor.edit(
                inverted,
                edits,
                pipeline=self.pipeline,
                source=self.source,
                template=self.template,
                batch_size=self.batch_size,
            )
            parts = [self.classifier.trunk_features(part) for part in torch.split(edited, self.batch_size)]
            found.append(torch.cat(parts))
        return found

    def calibration(self, strengths: tuple[float, float], points: int, bound: float) -> Calibration:
        """Calibration on a grid between two strengths; the arguments are those of :func:`calibrate`."""
        grid = sorted({0.0, *np.linspace(*strengths, points).round(6).tolist()})
        features, zero = self.features(grid), grid.index(0.0)
        away = _mean([perceptual_distance(item, item[zero, None].expand_as(item)) for item in features])
        return calibrate_strengths(grid, _steps(features), away, bound)

    def unevenness(self, calibration: Calibration, compared: int) -> tuple[float, float]:
        """Unevenness at equal steps of the strength, and of the calibrated strength."""
        before = np.linspace(calibration.strengths[0], calibration.strengths[-1], compared).tolist()
        after = [calibration.strength(length) for length in np.linspace(*calibration.range, compared)]
        return unevenness(_steps(self.features(before))), unevenness(_steps(self.features(after)))


def _steps(of_images: Sequence[Tensor]) -> list[float]:
    """Mean distances (S - 1) of neighbours, of features (S, P, F) of each image."""
    return _mean([perceptual_distance(item[1:], item[:-1]) for item in of_images])


def _mean(squares: Sequence[Tensor]) -> list[float]:
    """Roots of (S,) distances, averaged over images."""
    means: list[float] = torch.stack([values.sqrt() for values in squares]).mean(dim=0).tolist()
    return means


def calibrate_file(
    file: str,
    images: str,
    classifier: str,
    *,
    pretrained: str | None = None,
    **settings: Any,  # noqa: ANN401 - as calibrate has them, where the command line finds them
) -> Calibration:
    """Calibrate the token of an embedding file and keep the result in the file.

    Edits use it with ``calibrated: true``.

    Args:
        file: embedding file with the suffix ``.safetensors``.
        images: folder of images that are edited, or one image.
        classifier: timm name or folder of a frozen classifier, in whose features images are compared.
        pretrained: model; null for the one that the file names.
        settings: further settings of :func:`calibrate`.

    Raises:
        UserError: if a file cannot be read or written, no model is named, or see :func:`calibrate`.
    """
    embedding = load_embedding(file)
    model = pretrained or embedding.metadata.get("base_model")
    if model is None:
        raise UserError(f"'{file}' does not name its model; give it by --pretrained")
    if "/" not in model and not Path(model).expanduser().exists():
        raise UserError(
            f"'{file}' is for the model '{model}', which is not here by that name; give it by --pretrained"
        )
    assert embedding.path is not None
    found = calibrate(
        Pipeline.from_pretrained(model, tokens=str(embedding.path)),
        embedding.token,
        Path(images),
        classifier=classifier,
        **settings,
    )
    add_metadata(embedding.path, {CALIBRATION: found.to_json()})
    low, high = found.range
    before, after = found.unevenness or (float("nan"), float("nan"))
    print(
        f"{embedding.path}: {embedding.token} from {found.strengths[0]:.3g} to {found.strengths[-1]:.3g}, calibrated "
        f"{low:.3g} to {high:.3g}; unevenness {before:.3f} before, {after:.3f} after"
    )
    return found
