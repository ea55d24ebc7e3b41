"""The images of one request, shown while they form."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor

from tokenlearn.data.images_to_edit import EditableImage
from tokenlearn.diffusion import Inverted
from tokenlearn.editing import source_of
from tokenlearn.errors import UserError
from tokenlearn.guidance import SEGA, GuidanceRule
from tokenlearn.image_functions import read_images
from tokenlearn.page.previews import Handover, Previews, WatchedEditor, WatchedModel
from tokenlearn.page.recipe import Recipe
from tokenlearn.pasting import pasted_image
from tokenlearn.pipeline import to_images

V = TypeVar("V")
Show = Callable[[Image.Image], None]


@dataclass(frozen=True)
class Frame:
    """What the page shows at a moment.

    Attributes:
        before: images without tokens and concepts, or the photo.
        after: the same images with them.
        status: what is being done, for people.
        finished: whether the images are final.
    """

    before: Sequence[Image.Image]
    after: Sequence[Image.Image]
    status: str
    finished: bool = False


class Remembered:
    """The last results of long computations, found by all that they depend on.

    Args:
        most: number of results that are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._results: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, key: Hashable, make: Callable[[], V]) -> V:
        """The result for a key, made if it is not there."""
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
                return cast(V, self._results[key])
        made = make()  # without the lock, so that one browser does not wait here for another
        with self._lock:
            self._results[key] = made
            while len(self._results) > self._most:
                self._results.popitem(last=False)
        return made


class Drawing:
    """The work on one request.

    Args:
        recipe: what the images are made with.
        handover: takes frames.
        remembered: latents and inverted images of earlier requests.
        interval: seconds between previews.
    """

    def __init__(self, recipe: Recipe, handover: Handover[Frame], remembered: Remembered, interval: float) -> None:
        self.recipe, self.handover, self.remembered, self.interval = recipe, handover, remembered, interval
        self.pipeline, self.request = recipe.pipeline, recipe.request
        self.backbone = recipe.pipeline.backbone
        self.editor = WatchedEditor(self.backbone, recipe.editing)

    @torch.no_grad()
    def generate(self) -> None:
        """Generated images: by guidance with the concepts, and then edited with the tokens."""
        rule, strengths = self.recipe.rule, self.recipe.strengths
        guided, changed = isinstance(rule, SEGA), bool(self.recipe.concepts or strengths)
        before: list[Image.Image] = []
        after: list[Image.Image] = []
        for number, seed in enumerate(self.request.seeds, start=1):
            of = f"image {number} of {len(self.request.seeds)}"

            def show_before(image: Image.Image, status: str = f"{of} forms") -> None:
                self.handover.put(Frame([*before, image], [*after] if changed else [*after, image], status))

            def show_after(image: Image.Image, status: str = f"{of} is edited") -> None:
                self.handover.put(Frame([*before], [*after, image], status))

            latents = self._latents(seed, self.pipeline.sampling.rule, show_before)
            before.append(self._image(latents))
            if changed:
                show_after(before[-1])
            if guided:
                latents = self._latents(seed, rule, show_after)
            if strengths:
                edited = self._edited(latents, self._key(seed, rule), show_after)
                after.append(to_images(edited)[0])
            else:
                after.append(self._image(latents) if guided else before[-1])
        self.handover.put(Frame(before, after, "done", finished=True))

    @torch.no_grad()
    def edit(self) -> None:
        """A photo, edited with tokens and concepts; the edit is pasted onto it as a difference."""
        read = self._photo()
        photo, pixels = read.original, read.image
        assert photo is not None  # every image of a file has both
        assert pixels is not None
        if not self.recipe.photo_edits:
            self.handover.put(Frame([photo], [photo], "done", finished=True))
            return

        def show(image: Image.Image) -> None:
            self.handover.put(Frame([photo], [image], "the photo is edited"))

        self.handover.put(Frame([photo], [photo], "the photo is inverted"))
        latents = self.backbone.encode_images(pixels.to(self.backbone.device))
        key = blake2b(pixels.numpy().tobytes()).hexdigest()
        edited = self._guided(latents, key, show) if self.recipe.concepts else self._edited(latents, key, show)
        noisy, source = self._inverted(latents, key), source_of(self.pipeline, self.recipe.editing)
        unedited = self.remembered(
            ("unedited", key, self.recipe.editing), lambda: self.editor.denoise_towards(noisy, source, [], [])
        )
        self.handover.put(Frame([photo], [pasted_image(photo, edited[0], unedited[0])], "done", finished=True))

    def _photo(self) -> EditableImage:
        path = cast(Path, self.request.photo)
        try:
            (read,) = read_images(path, self.backbone, self.pipeline.sampling.size)
        except UserError as error:  # which names the place on the server
            raise UserError(str(error).replace(str(path), path.name)) from None
        return read

    def _key(self, seed: int, rule: GuidanceRule) -> Hashable:
        """All that the latents of a seed depend on."""
        concepts = tuple(rule.edits) if isinstance(rule, SEGA) else ()
        request = self.request
        return (request.prompt, request.negative_prompt, request.steps, request.guidance, seed, concepts)

    def _latents(self, seed: int, rule: GuidanceRule, show: Show) -> Tensor:
        """Latents (1, C, h, w) of the prompt, as :meth:`Pipeline.generate_latents` makes them."""

        def make() -> Tensor:
            model = self.pipeline.guided_model(self.pipeline.encode([self.request.prompt]), rule)
            return self.pipeline.sample_latents([seed], WatchedModel(model, self._previews(show)))

        return self.remembered(self._key(seed, rule), make)

    def _image(self, latents: Tensor) -> Image.Image:
        return to_images(self.backbone.decode_latents(latents))[0]

    def _inverted(self, latents: Tensor, key: Hashable) -> Inverted:
        source = source_of(self.pipeline, self.recipe.editing)
        return self.remembered(("inverted", key, self.recipe.editing), lambda: self.editor.invert(latents, source))

    def _edited(self, latents: Tensor, key: Hashable, show: Show) -> Tensor:
        """Image (1, 3, H, W) of latents, edited with the tokens."""
        noisy, source = self._inverted(latents, key), source_of(self.pipeline, self.recipe.editing)
        with self.editor.watched(self._previews(show)):
            return self.editor.edit(noisy, [self.recipe.strengths], pipeline=self.pipeline, source=source)

    def _guided(self, latents: Tensor, key: Hashable, show: Show) -> Tensor:
        """Image (1, 3, H, W) of latents, guided by tokens and concepts."""
        noisy, source = self._inverted(latents, key), source_of(self.pipeline, self.recipe.editing)
        rule = SEGA(list(self.recipe.photo_edits), 1.0)  # at scale 1, only concepts move the photo
        with self.editor.watched(self._previews(show)):
            return self.editor.denoise(noisy, self.pipeline.guided_model(source, rule))

    def _previews(self, show: Show) -> Previews:
        return Previews(self.handover.check, self.backbone.decode_latents, show, self.interval)
