"""What the page does, without a browser: images while they form, a judge's opinion, and files of what is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from tokenlearn.data.pixels import rgb_pixels, unit_range
from tokenlearn.errors import UserError
from tokenlearn.models import TimmClassifier
from tokenlearn.page.drawing import Drawing, Frame, Remembered
from tokenlearn.page.previews import INTERVAL, Handover, handed_over
from tokenlearn.page.recipe import Recipe, config_text, setting_of
from tokenlearn.page.request import PageRequest
from tokenlearn.pipeline import Pipeline
from tokenlearn.tokens import Embeddings, load_embeddings
from tokenlearn.tokens.files import EmbeddingFile, EmbeddingFormat
from tokenlearn.tokens.files.writing import write_tokens

_REMEMBERED = 32
REACH = 6.0
"""Highest strength on the slider of a token without a calibration."""


class Studio:
    """A model with tokens and a judge, and what a page does with them.

    One studio serves all browsers: a request has all that its images depend on, and what is remembered between
    requests is found by these.

    Args:
        pipeline: frozen model.
        embeddings: embedding files of the tokens, see :func:`tokenlearn.tokens.load_bank`.
        judge: classifier whose opinion of images is shown.
        preview_interval: seconds between the images that a request gives while it runs.

    Attributes:
        pipeline: the model with the tokens.
        embeddings, judge, preview_interval: as given.
        tokens: token to what its file says.

    Raises:
        UserError: if a file cannot be read, or does not fit the model.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        embeddings: Embeddings | None = None,
        judge: TimmClassifier | None = None,
        preview_interval: float = INTERVAL,
    ) -> None:
        self.pipeline = pipeline.with_tokens(embeddings) if embeddings else pipeline
        self.embeddings, self.judge, self.preview_interval = embeddings, judge, preview_interval
        files = load_embeddings(embeddings) if embeddings else []
        self.tokens: Mapping[str, EmbeddingFile] = {file.token: file for file in files}
        self._remembered = Remembered(_REMEMBERED)

    def is_calibrated(self, token: str) -> bool:
        """Whether equal steps of a token's strength change images equally, see ``tokenlearn calibrate``."""
        return self.pipeline.tokens is not None and token in self.pipeline.tokens.calibrations

    def strength_range(self, token: str) -> tuple[float, float]:
        """Lowest and highest strength of a token, calibrated ones if its file has them."""
        bank = self.pipeline.tokens
        return bank.calibrations[token].range if bank is not None and self.is_calibrated(token) else (-REACH, REACH)

    def show(self, request: PageRequest) -> Iterator[Frame]:
        """Images of a request while they form, generated or of a photo; the last frame is finished.

        Raises:
            UserError: if the request cannot be met; when the first frame is asked for.
        """
        return self.generate(request) if request.photo is None else self.edit(request)

    def generate(self, request: PageRequest) -> Iterator[Frame]:
        """Images of the prompt and seeds: by guidance with the concepts, and then edited with the tokens."""
        return handed_over(lambda handover: self._drawing(request, handover).generate())

    def edit(self, request: PageRequest) -> Iterator[Frame]:
        """The photo, edited with tokens and concepts; the edit is pasted onto it as a difference."""
        return handed_over(lambda handover: self._drawing(request, handover).edit())

    def _drawing(self, request: PageRequest, handover: Handover[Frame]) -> Drawing:
        return Drawing(Recipe(self.pipeline, request), handover, self._remembered, self.preview_interval)

    @torch.no_grad()
    def opinion(self, images: Sequence[Image.Image]) -> dict[str, float]:
        """Label to its probability by the judge, on average over images; empty without a judge or images."""
        if self.judge is None or not images:
            return {}
        device = self.pipeline.backbone.device
        logits = torch.cat([self.judge(unit_range([rgb_pixels(image)]).to(device)) for image in images])
        shares = logits.sigmoid() if self.judge.multi_label else logits.softmax(dim=1)
        return dict(zip(self.judge.label_names, shares.mean(dim=0).tolist(), strict=True))

    def yaml_of(self, request: PageRequest) -> str:
        """Config with which ``tokenlearn predict`` makes the images of a request.

        A photo is named without its folder.

        Raises:
            UserError: if the photo is not edited, so that there is nothing to make.
        """
        recipe = Recipe(self.pipeline, request)
        if request.photo is not None and not recipe.photo_edits:
            raise UserError("the photo is not edited; move a slider")
        used = [self.tokens[token] for token in recipe.used(self.tokens)]
        embeddings = setting_of(self.embeddings, used) if self.embeddings and used else None
        return config_text(recipe.config(embeddings), None if request.photo is None else request.photo.name)

    def token_file(
        self, token: str, folder: Path, *, format: EmbeddingFormat = "a1111", strength: float = 1.0
    ) -> Path:
        """Write the embedding file of a token for a program.

        Args:
            token: one of :attr:`tokens`.
            folder: folder of the file.
            format: the program that will load it.
            strength: factor on the vectors.

        Raises:
            UserError: if there is no such token, or the file cannot be written.
        """
        if token not in self.tokens:
            raise UserError(f"there is no token '{token}'; choose one of {', '.join(self.tokens) or 'none'}")
        (path,) = write_tokens([self.tokens[token]], folder, format, strength)
        return path
