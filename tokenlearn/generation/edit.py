"""Edit images with learned tokens (CASO, https://arxiv.org/abs/2505.14254)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from tokenlearn.data.images_to_edit import EditableImage
from tokenlearn.editing import Editing, ImageEditor, source_of, strengths_of
from tokenlearn.errors import UserError, check_at_least, check_file_name, check_template
from tokenlearn.generation.base import ImageBatches, batches_to_edit, images_to_edit, unfinished
from tokenlearn.generation.results import EditResult, EditTask, ResultPlan, file_stem
from tokenlearn.models import DiffusionBackbone
from tokenlearn.pasting import Paste, is_pasted
from tokenlearn.pipeline import Sampling, finished
from tokenlearn.token_task import TokenTask
from tokenlearn.tokens import Embeddings


class Edit(TokenTask, EditTask):
    """Edits images with tokens, from embedding files or a checkpoint (``--ckpt_path``).

    An image is inverted to a noise level once, by the unconditional model, and denoised for each edit with
    ``e_0 + sum_a s_a (e_a - e_0)`` over the tokens of the edit. Positive scales add what a token stands for, negative
    scales remove it. The images are settings of this task, so its configs have no data section.

    Args:
        backbone: frozen diffusion model.
        images: folder of images of any size, in any depth, or one image; null for generated images.
        prompts: images to generate and edit: each prompt with each seed. They are ignored beside ``images``.
        seeds: seeds of generated images.
        edits: edits of each image: token to signed scale, of one token or several.
        interpolations: token to the scales of a strip of edits by this token alone.
        embeddings: embedding files, see :func:`tokenlearn.tokens.load_bank`. The tokens of a checkpoint replace them.
        check_vocabulary: whether to say where tokens were learned beside other words than the backbone's; files of
            another width are refused in any case.
        template: prompt with ``{}`` where a token goes, as in training.
        editing: settings of inversion and denoising.
        sampling: settings of the sampler for generated images.
        batch_size: images to denoise at once.
        paste: images onto which edits are pasted as differences, so that the rest keeps its details: those that are
            ``larger`` than the model's size, ``always``, or ``never``. Generated images are at the model's size.
        calibrated: whether all strengths are calibrated ones, whose equal steps change images equally: from -1 to 1
            at most, see ``tokenlearn calibrate``.

    Attributes:
        images, plan: see :class:`EditTask`.
        edits, interpolations, template, editing, batch_size, paste, calibrated: as given.

    Raises:
        UserError: if there are no images or edits, an edit is there twice, or a number is out of range.
    """

    takes_checkpoint_tokens = True

    def __init__(
        self,
        backbone: DiffusionBackbone,
        *,
        images: str | None = None,
        prompts: list[str] = [],  # noqa: B006 - read only; a list is what YAML shows
        seeds: list[int] = [0],  # noqa: B006 - read only
        edits: list[dict[str, float]] = [],  # noqa: B006 - read only
        interpolations: dict[str, list[float]] = {},  # noqa: B006 - read only
        embeddings: Embeddings = [],  # noqa: B006 - read only
        check_vocabulary: bool = True,
        template: str = "{}",
        editing: Editing = Editing(),  # noqa: B008 - frozen
        sampling: Sampling = Sampling(solver="DDIM"),  # noqa: B008 - frozen
        batch_size: int = 8,
        paste: Paste = "larger",
        calibrated: bool = False,
    ) -> None:
        super().__init__(backbone, sampling)
        self.paste, self.calibrated = paste, calibrated
        self.load_embeddings(embeddings, check_vocabulary)
        self.images = images_to_edit(images, prompts, seeds, backbone=backbone, sampling=sampling)
        _check_edits(edits, interpolations)
        check_template(template, "model.template")
        check_at_least("model", 1, batch_size=batch_size)
        self.edits, self.interpolations, self.template, self.batch_size = edits, interpolations, template, batch_size
        self.editing, self.editor = editing, ImageEditor(backbone, editing, setting="model.editing")
        self.plan = ResultPlan(
            {edit_name(edit): "\n".join(f"{token} {scale:+g}" for token, scale in edit.items()) for edit in edits},
            {token: [f"{scale:+g}" if scale else "0" for scale in scales] for token, scales in interpolations.items()},
            writes_before=images is None,
        )

    def predict_dataloader(self) -> ImageBatches:
        """This rank's images."""
        return batches_to_edit(self.images, self.plan, self.trainer)

    def on_predict_start(self) -> None:
        """Check that every token of an edit is known.

        Raises:
            UserError: if one is not.
        """
        known = self.learned_placeholders
        for token, _ in _scales(self.edits, self.interpolations):
            if token not in known:
                near = difflib.get_close_matches(token, known, n=1)
                raise UserError(
                    f"no token '{token}' to edit with, only {', '.join(known) or 'none at all'}; "
                    + (f"did you mean '{near[0]}'? Else " if near else "")
                    + "give its file in model.embeddings, or --ckpt_path"
                )
        self._true_edits()  # refuses now what would fail at the first image
        edited = [token for token, _ in _scales(self.edits, self.interpolations)]
        self.check_prompts([*self.images.prompts, self.editing.source_prompt, self.template, *edited])

    def _true_edits(self) -> list[dict[str, float]]:
        """All edits and then the images of all strips, as token to the strength to edit with."""
        strips = [{token: scale} for token, scales in self.interpolations.items() for scale in scales]
        return [strengths_of(edit, self.bank, self.calibrated, "model.calibrated") for edit in [*self.edits, *strips]]

    def predict_step(self, batch: list[EditableImage | str]) -> list[EditResult]:
        """Edit the images of a batch that are not done."""
        return self.edit_images(unfinished(batch))

    def edit_images(self, images: Sequence[EditableImage]) -> list[EditResult]:
        """All edits of images, each of which is inverted once."""
        return [self._edit(image) for image in images]

    def _edit(self, image: EditableImage) -> EditResult:
        if image.image is None:
            latents = self.generate_latents([image.prompt], [image.seed])
            before = finished(self.backbone.decode_latents(latents))
        else:
            latents, before = self.backbone.encode_images(image.image), image.image
        source = source_of(self.pipeline, self.editing)
        inverted = self.editor.invert(latents, source)
        edited = self.editor.edit(
            inverted,
            self._true_edits(),
            pipeline=self.pipeline,
            source=source,
            template=self.template,
            batch_size=self.batch_size,
        )
        edits, *strips = torch.split(edited, [len(self.edits), *map(len, self.interpolations.values())])
        height, width = before.shape[-2:]
        unedited = None
        if image.original is not None and is_pasted(self.paste, image.size, (width, height)):
            unedited = self.editor.denoise_towards(inverted, source, [], [])[0]
        return EditResult(
            image, before[0], edits, dict(zip(self.interpolations, strips, strict=True)), unedited=unedited
        )


def edit_name(edit: Mapping[str, float]) -> str:
    """Name of an edit in files: ``{"<smile>": 3, "<hat>": -2}`` gives ``smile+3_hat-2``."""
    return "_".join(f"{file_stem(token)}{scale:+g}" for token, scale in edit.items())


def _check_edits(edits: Sequence[Mapping[str, float]], interpolations: Mapping[str, Sequence[float]]) -> None:
    """Refuse no edit at all, edits of one name, and scales that are missing or not finite."""
    if not any(edits) and not interpolations:
        raise UserError("model.edits and model.interpolations are empty; give an edit, such as {<smile>: 3}")
    for token, scales in interpolations.items():
        if not scales:
            raise UserError(f"model.interpolations has no scale for '{token}'; give scales, such as [-4, 0, 4]")
    for token, scale in _scales(edits, interpolations):
        if not math.isfinite(scale):
            raise UserError(f"the scale of '{token}' must be a finite number, got {scale}")
    names = [edit_name(edit) for edit in edits]
    for name in names:
        check_file_name(name, "the edit of model.edits")
    if (twice := next((name for name in names if names.count(name) > 1 or not name), None)) is not None:
        raise UserError(f"model.edits has '{twice}' twice or an edit without a token; remove it")


def _scales(
    edits: Sequence[Mapping[str, float]], interpolations: Mapping[str, Sequence[float]]
) -> Iterator[tuple[str, float]]:
    """Every token with each of its scales."""
    for edit in edits:
        yield from edit.items()
    for token, scales in interpolations.items():
        yield from ((token, scale) for scale in scales)
