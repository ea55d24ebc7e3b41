"""Functions from images to images: edits by tokens or guidance, and optimised latents."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from PIL import Image
from torch import Tensor

from tokenlearn.diffusion import Gradient
from tokenlearn.diffusion.latent_optimisation import LatentOptimisation
from tokenlearn.editing import Editing, ImageEditor, source_of, strengths_of
from tokenlearn.errors import UserError, check_template
from tokenlearn.guidance import GuidanceRule, check_tokens
from tokenlearn.latent_optimiser import History, LatentOptimiser, Start, sampling_for
from tokenlearn.losses.objective import Objective, as_objective
from tokenlearn.models import DiffusionBackbone
from tokenlearn.pasting import Paste, is_pasted, pasted_image
from tokenlearn.pipeline import Pipeline, to_images

if TYPE_CHECKING:
    from tokenlearn.data.images_to_edit import EditableImage

ImageInput = Image.Image | str | Path | Sequence[Image.Image | str | Path]
"""Images to edit: an image, a file or a folder, or several of them."""


def edit_images(
    pipeline: Pipeline,
    images: ImageInput | None,
    edit: Mapping[str, float] | GuidanceRule,
    *,
    prompts: str | Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    template: str = "{}",
    editing: Editing | None = None,
    paste: Paste = "larger",
    calibrated: bool = False,
    **changes: Any,  # noqa: ANN401 - fields of Editing
) -> list[Image.Image]:
    """Edit images, or images that are generated first.

    Args:
        pipeline: generates images, and knows the tokens.
        images: images of any size; None for generated images.
        edit: token or words to signed scale; or a guidance rule, such as ``SEGA(["glasses"], guidance_scale=1)``, that
            guides the image away from the source prompt.
        prompts: images to generate: each prompt with each seed.
        seeds: seeds of the initial latents.
        template: prompt with ``{}`` where a token goes.
        editing: settings of the edit.
        paste: images onto which the edit is pasted as a difference, so that the rest keeps its details: those that
            are ``larger`` than the model's size, ``always``, or ``never``.
        calibrated: whether strengths are calibrated ones, see :func:`tokenlearn.calibration.calibrate`.
        changes: changed settings of the edit, such as ``inversion="edit_friendly"``.

    Returns:
        Edited images at the sizes of the given images.

    Raises:
        UserError: if an image cannot be read, there is none, a token is not loaded, the template cannot be used,
            or a setting is out of range.
    """
    editing = dataclasses.replace(editing or Editing(), **changes)
    check_template(template, "template")
    known = () if pipeline.tokens is None else pipeline.tokens.placeholders
    check_tokens(edit.concept_prompts if isinstance(edit, GuidanceRule) else list(edit), known)
    if isinstance(edit, GuidanceRule) and calibrated:
        raise UserError("calibrated strengths are of tokens; give token to strength, or set calibrated to false")
    if paste not in get_args(Paste):
        raise UserError(f"paste is {paste!r}; use {', '.join(get_args(Paste))}")
    strengths = {} if isinstance(edit, GuidanceRule) else strengths_of(edit, pipeline.tokens, calibrated)
    editor = ImageEditor(pipeline.backbone, editing)
    source = source_of(pipeline, editing)
    edited: list[Image.Image] = []

    def add(latents: Tensor, read: EditableImage | None) -> None:
        noisy = editor.invert(latents, source)
        if isinstance(edit, GuidanceRule):
            made = editor.denoise(noisy, pipeline.guided_model(source, edit))
        else:
            made = editor.edit(noisy, [strengths], pipeline=pipeline, source=source, template=template)
        height, width = made.shape[-2:]
        if read is None or read.original is None or not is_pasted(paste, read.size, (width, height)):
            edited.extend(_resized(made, None if read is None else read.size))
            return
        unedited = editor.denoise_towards(noisy, source, [], [])
        edited.append(pasted_image(read.original, made[0], unedited[0]))

    with torch.no_grad():
        if images is not None:
            for read in read_images(images, pipeline.backbone, pipeline.sampling.size):
                assert read.image is not None
                add(pipeline.backbone.encode_images(read.image.to(pipeline.backbone.device)), read)
            return edited
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            for seed in seeds:
                add(pipeline.generate_latents([prompt], [seed]), None)
    if not edited:
        raise UserError("there is nothing to edit; give an image, or a prompt and a seed")
    return edited


@dataclass(frozen=True)
class OptimisedImages:
    """Images before and after an optimisation of their latents.

    Attributes:
        images: optimised images.
        before: the images that they began as.
        latents: optimised latents (C, h, w) of each, or pairs (2, C, h, w) of photos.
        history: losses of each.
    """

    images: list[Image.Image] = field(default_factory=list)
    before: list[Image.Image] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    history: list[History] = field(default_factory=list)


def optimise_latents(
    pipeline: Pipeline,
    prompts: str | Sequence[str] = (),
    *,
    objective: Objective | Sequence[Objective],
    seeds: Sequence[int] = (0,),
    images: ImageInput | None = None,
    source_prompt: str = "",
    judge: Objective | None = None,
    gradient: Gradient | None = None,
    optimisation: LatentOptimisation | None = None,
    batch_size: int = 1,
    progress: bool = True,
    **changes: Any,  # noqa: ANN401 - fields of LatentOptimisation
) -> OptimisedImages:
    """Optimise the latents of images, so that the finished images meet an objective (DOODL).

    Args:
        pipeline: generates the images.
        prompts: images to generate: each prompt with each seed.
        objective: loss of finished images, such as ``ClassifierLoss(...) + 8 * CLIPTextLoss(...)``; of several, their
            sum.
        seeds: seeds of the initial latents, and of the perturbations.
        images: photos to edit instead: images, files or folders. They are inverted by a reversible solver, by EDICT
            unless the pipeline has another.
        source_prompt: what the photos show.
        judge: reports in the history, and guides nothing.
        gradient: how the gradient goes through the sampler, see :class:`LatentOptimiser`.
        optimisation: settings of the optimisation.
        batch_size: generated images at once.
        progress: whether to show a progress bar.
        changes: changed settings of the optimisation, such as ``steps=60``.

    Returns:
        Generated images, all seeds of the first prompt first; or photos at their sizes.

    Raises:
        UserError: if there is nothing to optimise, see also :class:`LatentOptimiser`.
    """
    sampling = sampling_for(pipeline.sampling, inverts=images is not None)
    device = pipeline.backbone.device
    optimiser = LatentOptimiser(
        Pipeline(pipeline.backbone, tokens=pipeline.tokens, sampling=sampling),
        as_objective(objective).to(device),
        dataclasses.replace(optimisation or LatentOptimisation(), **changes),
        gradient=gradient,
        judge=None if judge is None else judge.to(device),
    )
    result = OptimisedImages()

    def add(start: Start, names: Sequence[str], size: tuple[int, int] | None = None) -> None:
        optimised = optimiser.optimise(start, names=names, progress=names[0] if progress else None)
        result.images.extend(_resized(optimised.after, size))
        result.before.extend(_resized(optimised.before, size))
        result.latents.extend(optimised.latents.cpu())
        result.history.extend(optimised.history)

    if images is not None:
        for image in read_images(images, pipeline.backbone, pipeline.sampling.size):
            assert image.image is not None
            add(optimiser.from_images(image.image, [image.seed], source_prompt), [image.name], image.size)
        return result
    given = [prompts] if isinstance(prompts, str) else prompts
    samples = [(prompt, seed) for prompt in given for seed in seeds]
    if not samples:
        raise UserError("there is nothing to optimise; give a prompt and a seed, or images")
    for first in range(0, len(samples), batch_size):
        batch = samples[first : first + batch_size]
        start = optimiser.from_prompts([prompt for prompt, _ in batch], [seed for _, seed in batch])
        add(start, [f"{prompt}, seed {seed}" for prompt, seed in batch])
    return result


def read_images(
    images: ImageInput, backbone: DiffusionBackbone, size: tuple[int, int] | None = None
) -> list[EditableImage]:
    """Images at a size that a model takes, with their names and sizes.

    Of a folder, images that cannot be read are left out with a warning.

    Args:
        images: images or their files.
        backbone: the model.
        size: (height, width), of which the smaller is their shorter side; None for the size the model was trained for.

    Raises:
        UserError: if a named image or no image of a folder can be read, or there is none.
    """
    from tokenlearn.data.images_to_edit import FolderImages

    side = min(size or (backbone.latent_size * backbone.vae_scale_factor,))
    sources = [images] if isinstance(images, Image.Image | str | Path) else images
    folders = [FolderImages(source, side, backbone.vae_scale_factor) for source in sources]
    read: list[EditableImage] = []
    skipped: list[UserError] = []
    for folder in folders:
        for index in range(len(folder.names)):
            try:
                read.append(folder[index])
            except UserError as error:
                if len(folder.names) == 1:
                    raise
                skipped.append(error)
    if skipped and not read:
        raise UserError(f"none of {len(skipped)} images can be used; the first: {skipped[0]}") from skipped[0]
    if skipped:
        warnings.warn(f"skipped {len(skipped)} images that cannot be used; the first: {skipped[0]}", stacklevel=2)
    if not read:
        raise UserError("the list of images is empty; give at least one")
    return read


def _resized(images: Tensor, size: tuple[int, int] | None) -> list[Image.Image]:
    """PIL images of (B, 3, H, W) in [0, 1] at another size, if one is given."""
    made = to_images(images)
    return made if size is None else [image.resize(size, Image.Resampling.LANCZOS) for image in made]
