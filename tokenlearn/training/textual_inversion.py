"""Textual inversion (Gal et al., ICLR 2023, https://arxiv.org/abs/2208.01618), with a token per class of labels."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import SumMetric

from tokenlearn.data.batches import ImageBatch
from tokenlearn.data.interfaces import LabelledImages, find_data
from tokenlearn.data.labels import UNKNOWN
from tokenlearn.errors import UserError, check_at_least, check_template
from tokenlearn.losses import MinSNR, denoising_error
from tokenlearn.models import DiffusionBackbone
from tokenlearn.models.attributes import check_class_names, check_class_range, labelled_attributes
from tokenlearn.pipeline import Sampling
from tokenlearn.tokens.settings import TokenSettings
from tokenlearn.training.base import TokenTraining, adamw

_IMAGE_SEEDS = (0, 1)  # with many tokens, images take longer than everything else in a validation


class Sample(NamedTuple):
    """The random part of a sample.

    Attributes:
        prompt: prompt with a token of the image, or with any token if no class of the image is known.
        timestep: timestep of the noise.
        noise: (C, h, w).
        labelled: whether a class of the image is known.
    """

    prompt: str
    timestep: int
    noise: Tensor
    labelled: bool


class TextualInversion(TokenTraining):
    """Learn one token per class of each attribute, such that the frozen model denoises images of the class best.

    The loss is the diffusion model's (equation 2 of the paper),

        min over v of E w_t |e - e_theta(z_t, t, c(y))|^2,    z_t = alpha_t x0 + sigma_t e

    with what the network predicts in place of the noise e: the velocity or the flow of models that predict these.
    Compared as noise, their errors would count alpha_t^2 times, and hardly at all where there is much noise. The
    expectation is over images x0 of the class and prompts y with its token, whose vectors v are all that is learned.
    Each sample is for one class of its image, chosen at random among the known ones. The random numbers of a sample
    depend on its position in the training only, not on the number of processes.

    Args:
        backbone: frozen diffusion model.
        attributes: attributes to learn: the name of a label, to the names of its classes in the order of the data, or
            to null for a boolean label (tokens ``<smile>`` and ``<no-smile>``).
        tokens: settings of the tokens.
        templates: prompts with ``{}`` where the token goes, one of which is chosen for each sample. Images of
            validations have the first.
        weighting: weights ``w_t`` of the timesteps; null for 1, as published. Validations have the same.
        seed: seed of the samples.
        sampling: settings of the sampler for images of validations.
        optimizer: over the token vectors only.
        lr_scheduler: stepped after every optimizer step; null keeps the learning rate.

    Attributes:
        attributes: the attributes with the names of their classes and tokens.
        placeholders: tokens of all classes, attribute by attribute.
        templates, weighting, seed: as given.
        validation_error: sum of the errors of a validation.
        validation_images: number of images with a known class in a validation.

    Raises:
        UserError: for attributes or templates that cannot be used, tokens without words to start from, or a number
            that is out of range.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        attributes: dict[str, list[str] | None],
        *,
        tokens: TokenSettings = TokenSettings(),  # noqa: B008 - frozen
        templates: list[str] = ["{}"],  # noqa: B006 - read only; a list is what YAML shows
        weighting: MinSNR | None = None,
        seed: int = 0,
        sampling: Sampling = Sampling(steps=20, guidance=4.0),  # noqa: B008 - frozen
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(backbone, tokens=tokens, sampling=sampling, optimizer=optimizer, lr_scheduler=lr_scheduler)
        if not attributes:
            raise UserError("model.attributes is empty; name at least one label of the data")
        if not templates:
            raise UserError("model.templates is empty; give at least one, such as '{}'")
        for template in templates:
            check_template(template, "model.templates")
        if tokens.initial_words is None:
            raise UserError("model.tokens.initial_words is null, but TextualInversion does not search; set it to 'a'")
        check_at_least("model", 0, seed=seed)
        self.attributes = labelled_attributes(attributes, tokens.placeholder)
        self.templates, self.weighting, self.seed = templates, weighting, seed
        words = self._initial_words()
        starts = {
            token: words[name]
            for attribute in self.attributes
            for name, token in zip(attribute.class_names, attribute.placeholders, strict=True)
        }
        self.placeholders = list(starts)
        self._images_of_token = torch.zeros(len(starts), dtype=torch.long)
        self.use_bank(self.make_bank(starts))
        # A value that is not finite must stay in the sum: the tokens are then no improvement.
        self.validation_error = SumMetric(nan_strategy="disable")
        self.validation_images = SumMetric()

    @property
    def monitor(self) -> tuple[str, Literal["max", "min"]]:
        """See :class:`tokenlearn.token_task.TokenTask`: the loss of held-out images."""
        return "val/loss", "min"

    def setup(self, stage: str) -> None:
        """Refuse data that are known to lack an attribute, or whose class indices are known to differ in meaning.

        Raises:
            UserError: naming the attribute.
        """
        data = find_data(self.trainer, LabelledImages)
        if data is None:
            return
        for attribute in self.attributes:
            _require_label(attribute.name, data.class_names)
            fix = f"list those of the data, in their order, in model.attributes.{attribute.name}"
            check_class_names(attribute, data.class_names[attribute.name], fix)

    def training_step(self, batch: ImageBatch) -> Tensor:
        """Return the mean error of the predictions, over the images with a known class.

        Raises:
            UserError: if labels do not match, no image on any device has one, or the loss is not finite.
        """
        positions = self.sample_positions(len(batch.names))
        rngs = [np.random.default_rng([self.seed, place]) for place in positions]
        errors, labelled = self.denoising_errors(batch, rngs)
        self._count_images(batch)
        count = self.trainer.strategy.reduce(labelled.sum(), reduce_op="sum")
        if not count:
            raise UserError(
                f"no image of the batch has a known class of {self._attribute_names}; name the columns of labels in "
                "data.labels.columns, leave out images without labels by data.keep, or raise data.batch_size"
            )
        # Gradients of processes are averaged, but one process may have more images that count than another.
        loss = self.require_finite(errors[labelled].sum() * self.trainer.world_size / count)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.names), sync_dist=True)
        return loss

    def _count_images(self, batch: ImageBatch) -> None:
        """Count the images of the class of each token."""
        first = 0
        for attribute, classes in zip(self.attributes, zip(*self._classes(batch), strict=True), strict=True):
            for index in classes:
                if index != UNKNOWN:
                    self._images_of_token[first + index] += 1
            first += len(attribute.class_names)

    def on_train_end(self) -> None:
        """Warn of tokens that are as they started, because no image was of their class; a resumed fit cannot know."""
        if self.resumed:
            return
        counts = self.trainer.strategy.reduce(self._images_of_token.to(self.device), reduce_op="sum")
        unseen = [token for token, count in zip(self.placeholders, counts.tolist(), strict=True) if not count]
        if unseen:
            rank_zero_warn(
                f"no training image was of the class of {', '.join(unseen)}, which learned nothing; check the labels: "
                "-1 and empty values mean that a class is not known"
            )

    @torch.no_grad()
    def validation_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Any] | None:
        """Denoise held-out images, each with the same class, template, timestep and noise at every validation.

        Returns:
            For callbacks, with the first batch, images (B, 3, H, W) in [0, 1] of each token on the same few seeds.
        """
        rngs = [np.random.default_rng(zlib.crc32(name.encode())) for name in batch.names]
        errors, labelled = self.denoising_errors(batch, rngs)
        self.validation_error.update(errors[labelled])
        self.validation_images.update(labelled.sum())
        if batch_idx > 0 or self.global_rank > 0:  # callbacks show images of the first process only
            return None
        number = len(_IMAGE_SEEDS)
        prompts = [self.templates[0].format(token) for token in self.placeholders]
        # One token at a time: all at once would take more memory than the training does.
        images = [self.pipeline.generate([prompt] * number, _IMAGE_SEEDS).clamp(0, 1) for prompt in prompts]
        return {"images": torch.cat(images), "rows": [token for token in self.placeholders for _ in range(number)]}

    def on_validation_epoch_end(self) -> None:
        """Log the loss over all held-out images with a known class.

        Raises:
            UserError: if there is none.
        """
        total, count = self.validation_error.compute(), self.validation_images.compute()
        if not count:
            raise UserError(
                f"no held-out image has a known class of {self._attribute_names}; raise data.held_out.validation"
            )
        self.log("val/loss", total / count, prog_bar=True)
        self.validation_error.reset()
        self.validation_images.reset()

    def _initial_words(self) -> dict[str, str]:
        """Class to the words that its token starts from."""
        return self.token_settings.words_of([name for item in self.attributes for name in item.class_names])

    def token_metadata(self) -> dict[str, dict[str, str]]:
        """Method, attribute, class and settings of each token."""
        metadata = super().token_metadata()
        settings: dict[str, Any] = {
            "templates": self.templates,
            "negative_prompt": self.sampling.negative_prompt,
        }
        if self.weighting is not None:
            settings["weighting"] = str(self.weighting)
        words = self._initial_words()
        for attribute in self.attributes:
            for name, token in zip(attribute.class_names, attribute.placeholders, strict=True):
                metadata[token] |= {
                    "method": "textual_inversion",
                    "attribute": attribute.name,
                    "class": name,
                    "prompt": self.templates[0].format(token),
                    "config": json.dumps(settings | {"initial_words": words[name]}),
                }
        return metadata

    def denoising_errors(self, batch: ImageBatch, rngs: Sequence[np.random.Generator]) -> tuple[Tensor, Tensor]:
        """Errors of the predictions.

        Args:
            batch: B images.
            rngs: source of random numbers of each image.

        Returns:
            Weighted mean squared error of each image (B,), and whether a class of it is known (B,) bool.
        """
        classes = self._classes(batch)
        latents = self.clean_latents(batch)
        samples = [self.sample(rng, row, latents.shape[1:]) for rng, row in zip(rngs, classes, strict=True)]
        timesteps = torch.tensor([sample.timestep for sample in samples], device=self.device)
        noise = torch.stack([sample.noise for sample in samples]).to(self.device)
        noisy = self.backbone.process.add_noise(latents, noise, timesteps)
        # Images that do not count go through as well, so that each process has a gradient to average.
        conditioning = self.pipeline.encode([sample.prompt for sample in samples])
        process = self.backbone.process
        predicted = self.backbone(noisy, timesteps, conditioning)
        errors = denoising_error(predicted, process.target(latents, noise, timesteps))
        if self.weighting is not None:
            alpha, sigma = process.alpha(timesteps), process.sigma(timesteps)
            errors = errors * self.weighting.weights(alpha, sigma, process.kind)
        return errors, torch.tensor([sample.labelled for sample in samples], device=self.device)

    def sample(self, rng: np.random.Generator, classes: Sequence[int], shape: Sequence[int]) -> Sample:
        """The random part of a sample.

        Args:
            rng: source of random numbers.
            classes: class index of the image for each attribute, -1 where it is not known.
            shape: (C, h, w) of the noise.
        """
        known = [
            attribute.placeholders[index]
            for attribute, index in zip(self.attributes, classes, strict=True)
            if index != UNKNOWN
        ]
        candidates = known or self.placeholders
        token = candidates[int(rng.integers(len(candidates)))]
        template = self.templates[int(rng.integers(len(self.templates)))]
        timestep = int(rng.integers(self.backbone.process.num_timesteps))
        noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        return Sample(template.format(token), timestep, noise, bool(known))

    def _classes(self, batch: ImageBatch) -> list[list[int]]:
        """Class indices of each image, one per attribute, -1 where it is not known."""
        for attribute in self.attributes:
            _require_label(attribute.name, batch.labels)
        classes = torch.stack([batch.labels[attribute.name] for attribute in self.attributes], dim=1).cpu()
        check_class_range(classes, self.attributes)
        rows: list[list[int]] = classes.tolist()
        return rows

    @property
    def _attribute_names(self) -> str:
        return ", ".join(attribute.name for attribute in self.attributes)


def _require_label(name: str, labels: Mapping[str, Any]) -> None:
    """Raise UserError if there is no label of a name."""
    if name not in labels:
        raise UserError(
            f"the data have labels of {', '.join(sorted(labels)) or 'nothing'}, not of '{name}'; name its column in "
            "data.labels.columns, or leave it out of model.attributes"
        )
