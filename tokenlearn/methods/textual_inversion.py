"""Textual inversion (Gal et al., ICLR 2023, https://arxiv.org/abs/2208.01618), with a token per class of labels."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import SumMetric

from tokenlearn.data.images import ImageBatch
from tokenlearn.data.labels import UNKNOWN
from tokenlearn.diffusion.schedule import add_noise
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.methods.attributes import check_class_names, labelled_attributes
from tokenlearn.methods.learning import TokenLearning, adamw
from tokenlearn.models import DiffusionBackbone

_PICTURE_SEEDS = (0, 1)  # with many tokens, pictures take longer than everything else in a validation


class _Draw(NamedTuple):
    """What is random about a sample: prompt with a token of the picture, timestep, and noise (C, h, w).

    A picture of which no class is known has the prompt of any token, and ``labelled`` is false.
    """

    prompt: str
    timestep: int
    noise: Tensor
    labelled: bool


class TextualInversion(TokenLearning):
    """Learn one token per class of each attribute, such that the frozen model denoises the pictures of the class best.

    The loss is the diffusion model's own (equation 2 of the paper),

        min over v of E |e - e_theta(z_t, t, c(y))|^2,    z_t = alpha_t x0 + sigma_t e

    over pictures x0 of the class and prompts y with its token, whose vectors v are all that is learned. Each sample of
    the training is for one class of its picture, drawn among those that are known. What is drawn depends on the
    sample's place in the training alone, not on the number of processes.

    Args:
        backbone: frozen diffusion model.
        attributes: attributes to learn: a label's name, to the names of its classes in the data's order, or to null
            for a boolean label (tokens ``<smile>`` and ``<no-smile>``).
        placeholder: how a class gives its token's name; ``{}`` is the class in lower case, with dashes for spaces.
        num_vectors: vectors per token.
        templates: prompts around a token, of which one is drawn for each sample. Pictures at validation have the
            first.
        initial_words: word or words whose embedding tokens start from.
        seed: names what is drawn for the samples of the training.
        num_inference_steps: sampling steps of pictures at validation.
        guidance_scale: classifier-free guidance scale of pictures at validation.
        scheduler: diffusers scheduler of pictures at validation by class name; null for the pipeline's own.
        negative_prompt: prompt of the unconditional branch of pictures at validation.
        hold_norms: after each step, scale token vectors into the range of norms in the vocabulary.
        optimizer: over the token vectors only.
        lr_scheduler: stepped after every optimizer step; null keeps the learning rate.

    Raises:
        UserError: for attributes or templates that cannot be used, or a number that is out of range.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        attributes: dict[str, list[str] | None],
        placeholder: str = "<{}>",
        num_vectors: int = 1,
        templates: list[str] = ["{}"],  # noqa: B006 - read only; a list is what YAML shows
        initial_words: str = "a",
        seed: int = 0,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.0,
        scheduler: str | None = None,
        negative_prompt: str = "",
        hold_norms: bool = False,
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(
            backbone,
            num_inference_steps,
            guidance_scale,
            scheduler,
            negative_prompt,
            hold_norms,
            optimizer,
            lr_scheduler,
        )
        if not attributes:
            raise UserError("model.attributes is empty; name at least one label of the data")
        if not templates:
            raise UserError("model.templates is empty; give at least one, such as '{}'")
        for template in templates:
            if template.count("{}") != 1:
                raise UserError(f"model.templates: '{template}' must have exactly one '{{}}', where the token goes")
        check_at_least("model", 0, seed=seed)
        self.attributes = labelled_attributes(attributes, placeholder)
        self.templates, self.initial_words, self.seed = templates, initial_words, seed
        self.tokens = [token for attribute in self.attributes for token in attribute.placeholders]
        self.use_bank(self.make_bank(dict.fromkeys(self.tokens, initial_words), num_vectors))
        # A value that is not finite must not be dropped from the sum: the tokens are then no improvement.
        self.validation_error = SumMetric(nan_strategy="disable")
        self.validation_pictures = SumMetric()

    def setup(self, stage: str) -> None:
        """Refuse data that are known to lack an attribute, or whose class indices are known to mean something else.

        Raises:
            UserError: naming the attribute.
        """
        known = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        if known is None:
            return
        for attribute in self.attributes:
            _require_label(attribute.name, known)
            fix = f"list those of the data, in their order, in model.attributes.{attribute.name}"
            check_class_names(attribute, known[attribute.name], fix)

    def training_step(self, batch: ImageBatch) -> Tensor:
        """Return the mean squared error of the predicted noise, over the pictures of which a class is known.

        Raises:
            UserError: if labels do not match, no picture has one on any device, or the loss is not finite.
        """
        positions = self.sample_positions(len(batch.names))
        errors, labelled = self._noise_errors(
            batch, [np.random.default_rng([self.seed, place]) for place in positions]
        )
        count = self.trainer.strategy.reduce(labelled.sum(), reduce_op="sum")
        if not count:
            raise UserError(
                f"no picture of the batch has a known class of {self._attribute_names}; name the labels' columns in "
                "data.label_columns, leave pictures without labels out with data.keep, or raise data.batch_size"
            )
        # Gradients of processes are averaged, of which one may have more pictures that count than another.
        loss = self.require_finite(errors[labelled].sum() * self.trainer.world_size / count)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.names), sync_dist=True)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Any] | None:
        """Denoise held-out pictures, for each the same class, template, timestep and noise at every validation.

        Returns:
            For callbacks, with the first batch, pictures generated with each token on the same few seeds.
        """
        rngs = [np.random.default_rng(zlib.crc32(name.encode())) for name in batch.names]
        errors, labelled = self._noise_errors(batch, rngs)
        self.validation_error.update(errors[labelled])
        self.validation_pictures.update(labelled.sum())
        if batch_idx > 0 or self.global_rank > 0:  # callbacks show the first process's pictures only
            return None
        shown = len(_PICTURE_SEEDS)
        prompts = [self.templates[0].format(token) for token in self.tokens]
        # A token at a time: for all at once, memory would have to be larger than in training.
        images = [self.generate([prompt] * shown, _PICTURE_SEEDS).clamp(0, 1) for prompt in prompts]
        return {"images": torch.cat(images), "rows": [token for token in self.tokens for _ in range(shown)]}

    def on_validation_epoch_end(self) -> None:
        """Log the loss over all held-out pictures of which a class is known.

        Raises:
            UserError: if there is none.
        """
        total, count = self.validation_error.compute(), self.validation_pictures.compute()
        if not count:
            raise UserError(
                f"no held-out picture has a known class of {self._attribute_names}; raise data.validation_images"
            )
        self.log("val/loss", total / count, prog_bar=True)
        self.validation_error.reset()
        self.validation_pictures.reset()

    def token_metadata(self) -> dict[str, dict[str, str]]:
        """Method, attribute, class and training settings of each token."""
        metadata = super().token_metadata()
        settings = {
            "templates": self.templates,
            "initial_words": self.initial_words,
            "negative_prompt": self.negative_prompt,
        }
        for attribute in self.attributes:
            for name, token in zip(attribute.class_names, attribute.placeholders, strict=True):
                metadata[token] |= {
                    "method": "textual_inversion",
                    "attribute": attribute.name,
                    "class": name,
                    "prompt": self.templates[0].format(token),
                    "config": json.dumps(settings),
                }
        return metadata

    def _noise_errors(self, batch: ImageBatch, rngs: Sequence[np.random.Generator]) -> tuple[Tensor, Tensor]:
        """Squared error of the predicted noise, and whether a class is known, of each picture: (B,) and (B,) bool."""
        classes = self._classes(batch)
        latents = self.clean_latents(batch)
        draws = [self._draw(rng, own, latents.shape[1:]) for rng, own in zip(rngs, classes, strict=True)]
        timesteps = torch.tensor([draw.timestep for draw in draws], device=self.device)
        noise = torch.stack([draw.noise for draw in draws]).to(self.device)
        noisy = add_noise(latents, noise, self.backbone.alphas[timesteps], self.backbone.sigmas[timesteps])
        # Pictures that do not count go through as well, so that each process has a gradient to average.
        conditioning = self.backbone.encode_prompts([draw.prompt for draw in draws])
        errors = (self.backbone.predict_noise(noisy, timesteps, conditioning) - noise).square().mean(dim=(1, 2, 3))
        return errors, torch.tensor([draw.labelled for draw in draws], device=self.device)

    def _classes(self, batch: ImageBatch) -> list[list[int]]:
        """Class indices of each picture, one per attribute, -1 where it is not known."""
        for attribute in self.attributes:
            _require_label(attribute.name, batch.labels)
        classes = torch.stack([batch.labels[attribute.name] for attribute in self.attributes], dim=1).cpu()
        for attribute, largest in zip(self.attributes, classes.amax(dim=0).tolist(), strict=True):
            if largest >= len(attribute.class_names):
                raise UserError(
                    f"the data have class {largest} of '{attribute.name}', whose {len(attribute.class_names)} classes "
                    f"in the model are numbered from 0; name all of them in model.attributes.{attribute.name}"
                )
        rows: list[list[int]] = classes.tolist()
        return rows

    def _draw(self, rng: np.random.Generator, classes: Sequence[int], shape: torch.Size) -> _Draw:
        """Draw for a picture whose class indices are given, one per attribute."""
        known = [
            attribute.placeholders[index]
            for attribute, index in zip(self.attributes, classes, strict=True)
            if index != UNKNOWN
        ]
        candidates = known or self.tokens
        token = candidates[int(rng.integers(len(candidates)))]
        template = self.templates[int(rng.integers(len(self.templates)))]
        timestep = int(rng.integers(len(self.backbone.alphas)))
        noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        return _Draw(template.format(token), timestep, noise, bool(known))

    @property
    def _attribute_names(self) -> str:
        return ", ".join(attribute.name for attribute in self.attributes)


def _require_label(name: str, labels: Mapping[str, Any]) -> None:
    """Raise UserError if there is no label of a name."""
    if name not in labels:
        raise UserError(
            f"the data have labels of {', '.join(sorted(labels)) or 'nothing'}, not of '{name}'; name its column in "
            "data.label_columns, or leave it out of model.attributes"
        )
