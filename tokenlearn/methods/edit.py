"""Edit pictures with learned tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tokenlearn.data.pictures import Picture
from tokenlearn.diffusion import Inverted
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.methods.editing import Inversion, PictureEditor
from tokenlearn.methods.picture_task import Edited, PictureTask, file_stem
from tokenlearn.models import DiffusionBackbone


def edit_name(edit: Mapping[str, float]) -> str:
    """What an edit is called in file names and captions: ``{"<smile>": 3, "<hat>": -2}`` gives ``smile+3_hat-2``."""
    return "_".join(f"{file_stem(token)}{scale:+g}" for token, scale in edit.items())


class Edit(PictureTask):
    """Edit pictures with tokens, from embedding files or from a checkpoint (``--ckpt_path``).

    A picture is inverted to a noise level once, by the unconditional model, and denoised again for each edit with
    ``e_0 + sum_a s_a (e_a - e_0)`` over the edit's tokens: the editing of CASO (https://arxiv.org/abs/2505.14254).
    Positive scales add what the token stands for, negative ones remove it. The pictures are settings of this task, so
    a config of it has no data section.

    Args:
        backbone: frozen diffusion model.
        images: folder of pictures of any size, in any depth, or one picture.
        prompts: pictures to generate and to edit, instead of a folder: each prompt with each seed.
        seeds: seeds of generated pictures.
        edits: the edits to make of each picture: token to signed scale, several at once if wanted.
        interpolations: token to the scales of a strip of edits by it alone.
        embeddings: embedding files. A checkpoint's tokens take their place.
        template: prompt around a token, as in training.
        timestep: noise level to invert to; more changes more. It must be one of the sampling steps'.
        num_inference_steps: steps of DDIM between clean pictures and pure noise, in either direction, of which those
            up to the timestep are made.
        guidance_scale: classifier-free guidance scale of generated pictures.
        negative_prompt: prompt of the unconditional branch.
        batch_size: edits of a picture to make at once.
        inversion: ``ddim`` is deterministic and comes back to a picture only in the limit of many steps;
            ``edit_friendly`` (https://arxiv.org/abs/2304.06140) comes back exactly at scale 0, so that photographs
            keep their details, and so do the invertible chains ``edict`` (https://arxiv.org/abs/2211.12446),
            ``leapfrog`` and ``o_belm`` without noise.

    Raises:
        UserError: if there are no pictures or edits, an edit is there twice, or a number is out of range.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        images: str | None = None,
        prompts: list[str] = [],  # noqa: B006 - read only; a list is what YAML shows
        seeds: list[int] = [0],  # noqa: B006 - as above
        edits: list[dict[str, float]] = [],  # noqa: B006 - as above
        interpolations: dict[str, list[float]] = {},  # noqa: B006 - as above
        embeddings: list[str] = [],  # noqa: B006 - as above
        template: str = "{}",
        timestep: int = 601,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str = "",
        batch_size: int = 8,
        inversion: Inversion = "ddim",
    ) -> None:
        super().__init__(
            backbone,
            images,
            prompts,
            seeds,
            embeddings,
            num_inference_steps,
            guidance_scale,
            "DDIM",
            negative_prompt,
        )
        if not any(edits) and not interpolations:
            raise UserError("model.edits and model.interpolations are empty; give an edit, such as {<smile>: 3}")
        if template.count("{}") != 1:
            raise UserError(f"model.template '{template}' must have exactly one '{{}}', where the token goes")
        check_at_least("model", 1, batch_size=batch_size)
        for token, scales in interpolations.items():
            if not scales:
                raise UserError(f"model.interpolations has no scale for '{token}'; give some, such as [-4, 0, 4]")
        for token, scale in _scales(edits, interpolations):
            if not math.isfinite(scale):
                raise UserError(f"the scale of '{token}' must be a finite number, got {scale}")
        names = [edit_name(edit) for edit in edits]
        if (twice := next((name for name in names if names.count(name) > 1 or not name), None)) is not None:
            raise UserError(f"model.edits has '{twice}' twice or an edit without a token; remove it")
        self.edits, self.interpolations, self.template, self.batch_size = edits, interpolations, template, batch_size
        self.captions = ["\n".join(f"{token} {scale:+g}" for token, scale in edit.items()) for edit in edits]
        self.edit_names, self.strip_scales = names, interpolations
        self.editor = PictureEditor(backbone, num_inference_steps, timestep, "model.timestep", inversion)

    def on_predict_start(self) -> None:
        """Check that every token of an edit is known.

        Raises:
            UserError: if one is not.
        """
        known = () if self.bank is None else self.bank.placeholders
        for token, _ in _scales(self.edits, self.interpolations):
            if token not in known:
                raise UserError(
                    f"no token '{token}' to edit with, only {', '.join(known) or 'none at all'}; give its file in "
                    "model.embeddings, or --ckpt_path"
                )

    def edit_pictures(self, pictures: Sequence[Picture]) -> list[Edited]:
        """Invert each picture once and make all its edits."""
        return [self._edit(picture) for picture in pictures]

    def _edit(self, picture: Picture) -> Edited:
        if picture.image is None:
            latents = self.generate_latents([picture.prompt], [picture.seed])
            before = self.backbone.decode_latents(latents).clamp(0, 1)
        else:
            latents, before = self.backbone.encode_images(picture.image), picture.image
        of_strips = [{token: scale} for token, scales in self.interpolations.items() for scale in scales]
        edited = self.denoise(self.invert(latents), [*self.edits, *of_strips])
        edits, *strips = torch.split(edited, [len(self.edits), *map(len, self.interpolations.values())])
        return Edited(picture, before[0], edits, dict(zip(self.interpolations, strips, strict=True)), {})

    def invert(self, latents: Tensor) -> Inverted:
        """Clean latents (B, C, h, w) at the noise level of the edits' timestep."""
        return self.editor.invert(latents, self.unconditional())

    def denoise(self, noisy: Inverted, edits: Sequence[Mapping[str, float]]) -> Tensor:
        """Images (E, 3, H, W) in [0, 1] from one inverted picture, one for each edit."""
        of_tokens: dict[tuple[str, ...], list[int]] = {}
        for index, edit in enumerate(edits):
            of_tokens.setdefault(tuple(sorted(edit)), []).append(index)
        images: dict[int, Tensor] = {}
        for tokens, indices in of_tokens.items():
            for start in range(0, len(indices), self.batch_size):
                part = indices[start : start + self.batch_size]
                images |= zip(part, self._denoise(noisy, tokens, [edits[index] for index in part]), strict=True)
        return torch.stack([images[index] for index in range(len(edits))])

    def _denoise(self, noisy: Inverted, tokens: Sequence[str], edits: Sequence[Mapping[str, float]]) -> Tensor:
        """The same for edits that all have the same tokens."""
        return self.editor.denoise(
            noisy.expand(len(edits)),
            self.unconditional(),
            [self.backbone.encode_prompts([self.template.format(token)]) for token in tokens],
            [torch.tensor([edit[token] for edit in edits]) for token in tokens],
        )


def _scales(
    edits: Sequence[Mapping[str, float]], interpolations: Mapping[str, Sequence[float]]
) -> Iterator[tuple[str, float]]:
    """Every token with every scale that it has somewhere."""
    for edit in edits:
        yield from edit.items()
    for token, scales in interpolations.items():
        yield from ((token, scale) for scale in scales)
