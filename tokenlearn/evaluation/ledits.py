"""LEDITS++ of diffusers, a rival that edits images by words alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenlearn.errors import UserError, check_at_least
from tokenlearn.models import DiffusionBackbone, StableDiffusion

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

_SEED = 0  # of every image, as in tokenlearn.editing


@dataclass(frozen=True, kw_only=True)
class LEditsPP:
    """Settings of LEDITS++ (https://arxiv.org/abs/2311.16711).

    Attributes:
        words: class to the words that ask for it. An edit that removes a class goes away from its words, and towards
            those of the opposite class if it has any.
        steps: steps of the inversion and of each edit.
        skip: share of further steps that are left out at the noisiest end; more changes less.
        scale: guidance scale of an edit of strength 1. Only a part of the image is guided, so it is larger than that
            of other methods.
        threshold: quantile below which guidance is masked out, as in semantic guidance.
        attention_mask: whether guidance is also masked by the attention to the words, at a quarter of the latents'
            size. False leaves the first mask alone.

    Raises:
        UserError: if there are no words or steps, or a number is out of range.
    """

    words: dict[str, str]
    steps: int = 20
    skip: float = 0.2
    scale: float = 3.0
    threshold: float = 0.8
    attention_mask: bool = True

    def __post_init__(self) -> None:
        if not self.words:
            raise UserError("evaluation.ledits.words is empty; give words for each class, such as {smile: smiling}")
        check_at_least("evaluation.ledits", 1, steps=self.steps)
        if self.skip < 0 or self.scale <= 0 or not 0 <= self.threshold < 1:
            raise UserError(
                "evaluation.ledits needs skip of at least 0, scale above 0 and threshold from 0 to below 1, got "
                f"{self.skip:g}, {self.scale:g} and {self.threshold:g}"
            )


class WordEdit:
    """Words of a class and of its opposite.

    Args:
        present: words of the class.
        absent: words of the opposite class, None without.
    """

    def __init__(self, present: str, absent: str | None) -> None:
        self.present, self.absent = present, absent

    def terms(self, adding: bool) -> dict[str, bool]:
        """Words to whether an edit goes away from them."""
        if adding:
            return {self.present: False}
        return {self.present: True} | ({} if self.absent is None else {self.absent: False})


class WordCounter:
    """A tokenizer whose lengths leave out padding, as LEDITS++ expects, to know which attention is that of the words.

    Those of fast tokenizers count it, so that the attention to the padding would be taken for that of the words.

    Args:
        tokenizer: the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str], **settings: Any) -> BatchEncoding:  # noqa: ANN401 - as of the tokenizer
        """Token ids of texts, as the tokenizer gives them."""
        found: BatchEncoding = self.tokenizer(texts, **settings)
        if "length" in found:
            found["length"] = found["attention_mask"].sum(dim=1)
        return found

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - as above
        return getattr(self.tokenizer, name)


class LEditsPPEditor:
    """Edits images by LEDITS++ in several directions, each at several strengths.

    Images are edited one by one, because the attention masks of diffusers mix the images of a batch.

    Args:
        backbone: frozen Stable Diffusion.
        settings: settings.
        edits: words of each direction.

    Raises:
        UserError: if the backbone is of another family.
    """

    def __init__(self, backbone: DiffusionBackbone, settings: LEditsPP, edits: Sequence[WordEdit]) -> None:
        if not isinstance(backbone, StableDiffusion):
            raise UserError(
                f"evaluation.ledits edits by a StableDiffusion, and model.backbone is a {type(backbone).__name__}; "
                "set evaluation.ledits to null"
            )
        self.backbone, self.settings, self.edits = backbone, settings, list(edits)

    @torch.no_grad()
    def edit(self, images: Tensor, scales: Tensor) -> Tensor:
        """Edited images (B, D, S, 3, H, W) in [0, 1].

        Args:
            images: (B, 3, H, W) in [0, 1].
            scales: (B, D, S) signed strengths of each direction, of one sign for each image and direction.
        """
        with self._pipeline() as pipeline:
            return torch.stack([self._edit_one(pipeline, *pair) for pair in zip(images, scales, strict=True)])

    def _edit_one(self, pipeline: Any, image: Tensor, scales: Tensor) -> Tensor:  # noqa: ANN401 - untyped in diffusers
        """Edits (D, S, 3, H, W) of one image (3, H, W) at scales (D, S)."""
        settings = self.settings
        generator = torch.Generator().manual_seed(_SEED)
        pipeline.invert(
            image[None],
            num_inversion_steps=settings.steps,
            skip=settings.skip,
            generator=generator,
        )
        edited = []
        for edit, strengths in zip(self.edits, scales.tolist(), strict=True):
            for strength in strengths:
                terms = edit.terms(adding=strength > 0)
                found = pipeline(
                    editing_prompt=list(terms),
                    reverse_editing_direction=list(terms.values()),
                    edit_guidance_scale=abs(strength) * settings.scale,
                    edit_threshold=settings.threshold,
                    use_intersect_mask=settings.attention_mask,
                    output_type="pt",
                )
                edited.append(found.images[0])
        return torch.stack(edited).reshape(*scales.shape, *image.shape)

    @contextmanager
    def _pipeline(self) -> Iterator[Any]:
        """The pipeline on the backbone's parts, whose attention is put back in the end."""
        from diffusers import DPMSolverMultistepScheduler, LEditsPPPipelineStableDiffusion

        backbone = self.backbone
        scheduler_class: Any = DPMSolverMultistepScheduler
        pipeline_class: Any = LEditsPPPipelineStableDiffusion
        pipeline = pipeline_class(
            vae=backbone.vae,
            text_encoder=backbone.text_encoders[0],
            tokenizer=WordCounter(backbone.tokenizers[0]),
            unet=backbone.unet,
            scheduler=scheduler_class.from_config(
                backbone.make_scheduler().config, algorithm_type="sde-dpmsolver++", solver_order=2
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        processors = backbone.unet.attn_processors
        try:
            yield pipeline
        finally:
            backbone.unet.set_attn_processor(processors)


def word_edits(words: Mapping[str, str], directions: Sequence[tuple[str, str | None]]) -> list[WordEdit]:
    """The words of each direction.

    Args:
        words: class to words.
        directions: class and opposite class, None without, of each direction.

    Raises:
        UserError: if a class has no words.
    """
    for name, _ in directions:
        if name not in words:
            raise UserError(f"evaluation.ledits.words has no class '{name}', only {', '.join(words)}; add it")
    return [WordEdit(words[name], words.get(opposite or "")) for name, opposite in directions]
