"""CASO: dataset-level embeddings of attributes (Chang et al., IJCAI 2025, https://arxiv.org/abs/2505.14254)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from tokenlearn.data.batches import ImageBatch
from tokenlearn.data.interfaces import LabelledImages, find_data
from tokenlearn.errors import UserError, check_at_least, check_template
from tokenlearn.guidance import GuidanceRule, check_tokens
from tokenlearn.losses import CasoObjective, EditedImages
from tokenlearn.metrics.class_accuracy import ClassAccuracy
from tokenlearn.models import DiffusionBackbone
from tokenlearn.models.attributes import resolve_attributes
from tokenlearn.models.classifier import TimmClassifier
from tokenlearn.models.frozen import Precision
from tokenlearn.objectives import have_same_weights, is_same_model
from tokenlearn.pipeline import Sampling
from tokenlearn.tokens.settings import TokenSettings
from tokenlearn.training.base import TokenTraining, adamw
from tokenlearn.training.caso_edit import Editor, Edits, TrainingEdit
from tokenlearn.training.caso_initialisation import (
    ClassMeans,
    Initialisation,
    check_data_classes,
    check_space,
    direction_vectors,
    first_batches,
    initial_words,
    log_collapse,
    measure_class_means,
    starting_vectors,
)
from tokenlearn.training.caso_targets import Targets, choose_targets, named_noise, present_classes

_SHEET_IMAGES = 4


class Caso(TokenTraining):
    """Learn one token per class of each attribute, such that an edit of an image by the token shows the class.

    The objective is the equation in :mod:`tokenlearn.losses.caso`. In each step, a class is chosen for every image.
    The image is noised, denoised in one step under guidance by the token of the class, and classified by a frozen
    classifier. A step evaluates the network once with gradient and once without. (The released code also inverts each
    image in 50 steps, for a timestep that is always the same.)

    Args:
        backbone: frozen diffusion model.
        classifier: timm name or folder of the classifier that guides, or a :class:`TimmClassifier` with its settings.
        attributes: each attribute with the labels of the classifier that are its classes; or with null, for the
            presence or absence of the label of that name (tokens ``<smile>`` and ``<no-smile>``).
        judge: timm name or folder of another classifier, whose accuracy is reported; null reports the guide's only.
        dtype: precision of classifiers that are given by name; null for the backbone's, or for float32 beside float16,
            in which small gradients are lost.
        tokens: settings of the tokens.
        template: prompt around a token; the published prompt is the token alone.
        initialisation: where tokens start.
        edit: how images are edited in training.
        objective: weights and forms of the terms of the objective.
        targets: class that an image is edited to: ``any`` class of any attribute, or a class that is ``missing`` by
            the image's labels, see :func:`tokenlearn.training.caso_targets.choose_targets`. With ``any``, the opposite
            of a rare class learns little: hardly any image has a hat to take off.
        seed: seed of what is chosen for the images.
        sampling: settings of the sampler for generated images; inversion takes its ``steps`` too.
        optimizer: over the token vectors only.
        lr_scheduler: stepped after every optimizer step; null keeps the learning rate.

    Attributes:
        classifier, judge: the classifiers; ``judge`` may be None.
        attributes, judge_attributes: the attributes among the labels of each classifier.
        placeholders: tokens of all classes, attribute by attribute.
        class_means: class means of each attribute in the classifier's features.
        editor: noises and edits images.
        template, initialisation, edit, objective, targets, seed: as given.

    Raises:
        UserError: if a classifier lacks a class or is missing, both classifiers are the same, the initialisation is in
            another space than the tokens, or a setting is out of range.
    """

    learns_outputs = True

    def __init__(
        self,
        backbone: DiffusionBackbone,
        classifier: str | TimmClassifier,
        attributes: dict[str, list[str] | None],
        *,
        judge: str | TimmClassifier | None = None,
        dtype: Precision | None = None,
        tokens: TokenSettings = TokenSettings(),  # noqa: B008 - frozen
        template: str = "{}",
        initialisation: Initialisation = Initialisation(),  # noqa: B008 - frozen
        edit: TrainingEdit = TrainingEdit(),  # noqa: B008 - frozen
        objective: CasoObjective = CasoObjective(),  # noqa: B008 - frozen
        targets: Targets = "any",
        seed: int = 0,
        sampling: Sampling = Sampling(steps=20, guidance=4.0),  # noqa: B008 - frozen
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(backbone, tokens=tokens, sampling=sampling, optimizer=optimizer, lr_scheduler=lr_scheduler)
        if not attributes:
            raise UserError("model.attributes is empty; name at least one attribute of the classifier")
        check_template(template, "model.template")
        check_at_least("model", 0, seed=seed)
        guide, reporting = _name(classifier), None if judge is None else _name(judge)
        if reporting is not None and is_same_model(reporting, guide):
            raise UserError(f"model.judge '{reporting}' is also model.classifier '{guide}'; name another judge")
        precision = dtype or ("float32" if backbone.precision == "float16" else backbone.precision)
        self.classifier = TimmClassifier(classifier, precision) if isinstance(classifier, str) else classifier
        self.judge = TimmClassifier(judge, precision) if isinstance(judge, str) else judge
        if self.judge is not None and have_same_weights(self.judge, self.classifier):
            raise UserError(
                f"model.judge '{reporting}' has the weights of model.classifier '{guide}'; name another judge"
            )
        self.attributes = resolve_attributes(attributes, self.classifier, tokens.placeholder)
        self.judge_attributes = (
            [] if self.judge is None else resolve_attributes(attributes, self.judge, tokens.placeholder)
        )
        self.template, self.seed = template, seed
        self.initialisation, self.edit, self.objective, self.targets = initialisation, edit, objective, targets

        self._classes = [(index, k) for index, item in enumerate(self.attributes) for k in range(len(item.classes))]
        self.placeholders = [token for item in self.attributes for token in item.placeholders]
        check_space(tokens, initialisation)
        self.use_bank(self.make_bank(initial_words(tokens, initialisation, self.attributes)))
        if initialisation.kind == "direction":
            starts = direction_vectors(initialisation, self.attributes, self.pipeline, tokens.space)
            self._set_starts(starts)
        check_tokens(edit.rule.concept_prompts, self.placeholders)
        self.editor = Editor(self.pipeline, edit)
        self.class_means = [ClassMeans.of_head(attribute) for attribute in self.attributes]
        self.guided_accuracy = ClassAccuracy(len(self.placeholders))
        self.judged_accuracy = ClassAccuracy(len(self.placeholders))

    def on_fit_start(self) -> None:
        """Measure the class means of the classifier, and start the tokens unless a checkpoint gave them.

        Raises:
            UserError: if the classes of the data differ from the model's, or the initialisation gets no images.
        """
        data, settings = find_data(self.trainer, LabelledImages), self.initialisation
        check_data_classes(self.attributes, data)
        # As in training, so that images and features are as the tokens will meet them.
        with torch.no_grad(), self.trainer.precision_plugin.train_step_context():
            batches = first_batches(data, settings.collapse_batches, self.device)
            self.class_means = measure_class_means(
                self.attributes,
                batches,
                lambda batch: self.classifier.features(self.clean_images(batch)),
                self.classifier.classify,
                self.device,
            )
            log_collapse(self.attributes, self.class_means, self.loggers, self.global_step)
            if settings.kind not in ("words", "direction") and not self.resumed:
                self._start_tokens(first_batches(data, settings.batches, self.device))

    def training_step(self, batch: ImageBatch) -> Tensor:
        """Edit every image towards a class that is chosen for it, and return the objective.

        Raises:
            UserError: if the loss is not finite on any device.
        """
        latents, positions = self.clean_latents(batch), self.sample_positions(len(batch.names))
        uses_present = self.objective.uses_present
        classify = (lambda: self.classifier(self.clean_images(batch, latents))) if uses_present else None
        targets = choose_targets(
            positions,
            present_classes(batch.labels, self.attributes, latents, classify),
            num_classes=[len(attribute.classes) for attribute in self.attributes],
            class_counts=[means.counts for means in self.class_means],
            targets=self.targets,
            timesteps=self.editor.timesteps,
            shape=latents.shape[1:],
            seed=self.seed,
        )
        prompts = [
            self.prompt(self.attributes[attribute].placeholders[target])
            for attribute, target in zip(targets.attributes, targets.classes.tolist(), strict=True)
        ]
        noisy = self.editor.noised(latents, targets.noise, targets.timesteps)
        edits = self.editor.edits(noisy, targets.timesteps)
        edited = edits.edited(prompts)
        features = self.classifier.features(self.backbone.decode_latents(edited))
        compared = self.objective.compared_rows(positions)
        images = EditedImages(
            attributes=targets.attributes,
            targets=targets.classes,
            present=targets.present,
            latents=latents,
            edited=edited,
            features=features,
            logits=self.classifier.classify(features).float(),
            compared=compared,
            unedited_logits=self._logits(edits.unedited(compared)) if compared else None,
        )
        attributes = [means.of(item) for means, item in zip(self.class_means, self.attributes, strict=True)]
        terms = self.objective(images, attributes)
        self.require_finite(terms.loss)
        for name, term in terms._asdict().items():
            if term is not None:
                figure = term.detach().mean()
                self.log(f"train/{name}", figure, prog_bar=name == "loss", batch_size=len(latents), sync_dist=True)
        return terms.loss

    @torch.no_grad()
    def validation_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Any] | None:
        """Edit each image by every token, always with the same noise.

        An edit counts where the image does not show the class without it.

        Returns:
            For callbacks, a few images of the first batch and all their edits.
        """
        latents = self.clean_latents(batch)
        before = self.backbone.decode_latents(latents).clamp(0, 1)
        edits = self._named_edits(batch.names, latents)
        observers = [(self.classifier, self.attributes, self.guided_accuracy)]
        if self.judge is not None:
            observers.append((self.judge, self.judge_attributes, self.judged_accuracy))
        logits_before = [classifier(before) for classifier, *_ in observers]
        images, rows = [before[:_SHEET_IMAGES]], ["image"]
        with edits.together():
            for group, (token, (index, target)) in enumerate(zip(self.placeholders, self._classes, strict=True)):
                edited = edits.edited([self.prompt(token)] * len(latents))
                after = self.backbone.decode_latents(edited).clamp(0, 1)
                groups = torch.full((len(latents),), group, device=self.device)
                for (classifier, attributes, accuracy), logits in zip(observers, logits_before, strict=True):
                    needed = attributes[index].class_index(logits) != target
                    correct = attributes[index].class_index(classifier(after)) == target
                    accuracy.update(correct[needed], groups[needed])
                images.append(after[:_SHEET_IMAGES])
                rows.append(token)
        if batch_idx > 0:
            return None
        return {"images": torch.cat(images), "rows": [row for row in rows for _ in images[0]]}

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies of edits: the guide's chooses the best tokens, the judge's only reports."""
        self.log_group_mean("val/guided_accuracy", self.guided_accuracy)
        if self.judge is not None:
            self.log_group_mean("val/judged_accuracy", self.judged_accuracy)

    def prompt(self, token: str) -> str:
        """Prompt with a token."""
        return self.template.format(token)

    def clean_images(self, batch: ImageBatch, latents: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of a batch, decoded from its ``latents`` (B, C, h, w) if it has no pixels."""
        if batch.images is not None:
            return batch.images
        return self.backbone.decode_latents(self.clean_latents(batch) if latents is None else latents).clamp(0, 1)

    def token_metadata(self) -> dict[str, dict[str, str]]:
        """Method, attribute, class and training settings of each token."""
        metadata = super().token_metadata()
        guidance, objective = self.edit.guidance, self.objective
        settings: dict[str, Any] = {
            "timesteps": [self.editor.timesteps[0], self.editor.timesteps[-1]],
            "targets": self.targets,
            "noising": self.edit.noising,
            "editing_loss": objective.editing,
            "reconstruction_weight": objective.reconstruction_weight,
            "preservation_weight": objective.preservation_weight,
            "preservation_every": objective.preservation_every,
            "guidance": type(guidance).__name__ if isinstance(guidance, GuidanceRule) else guidance,
            "initialisation": self.initialisation.kind,
            "space": self.token_settings.space,
            "negative_prompt": self.sampling.negative_prompt,
        }
        if self.edit.gradient is not None:
            settings["gradient"] = str(self.edit.gradient)
        words = initial_words(self.token_settings, self.initialisation, self.attributes)
        for attribute in self.attributes:
            for name, token in zip(attribute.class_names, attribute.placeholders, strict=True):
                metadata[token] |= {
                    "method": "caso",
                    "attribute": attribute.name,
                    "class": name,
                    "classifier": self.classifier.pretrained,
                    "prompt": self.prompt(token),
                    "config": json.dumps(settings | {"initial_words": words[token]}),
                }
        return metadata

    @torch.no_grad()
    def _logits(self, latents: Tensor) -> Tensor:
        """The classifier's logits (n, num_outputs) of decoded latents (n, C, h, w)."""
        logits: Tensor = self.classifier(self.backbone.decode_latents(latents))
        return logits

    def _named_edits(self, names: Sequence[str], latents: Tensor) -> Edits:
        """Edits of latents (B, C, h, w) with the noise of their names, at the middle timestep."""
        timesteps = self.editor.timesteps
        middle = torch.full((len(latents),), timesteps[len(timesteps) // 2], device=self.device)
        noise = named_noise(names, latents.shape[1:]).to(self.device)
        return self.editor.edits(self.editor.noised(latents, noise, middle), middle)

    def _start_tokens(self, batches: Iterable[ImageBatch]) -> None:
        """Move the tokens from their word to where the class means point to."""
        assert self.bank is not None
        edits: list[Edits] = []
        for batch in batches:
            found = self._named_edits(batch.names, self.clean_latents(batch))
            # All ranks look at the images of all, as one process would.
            gathered = cast(Tensor, self.all_gather(found.noisy)).reshape(-1, *found.noisy.shape[1:])
            edits += [self.editor.edits(part, found.timesteps) for part in torch.split(gathered, len(found))]
        token, words = self.placeholders[0], str(self.token_settings.initial_words)
        vectors = starting_vectors(
            self.initialisation,
            torch.cat(self.vectors_of(words), dim=1),
            torch.cat([means.directions.to(self.device) for means in self.class_means]),
            edits=edits,
            pipeline=self.pipeline,
            placeholder=token,
            prompt=self.prompt(token),
            classifier=self.classifier,
            show_progress=self.global_rank == 0 and self.trainer.progress_bar_callback is not None,
        )
        starts = zip(self.placeholders, self.trainer.strategy.broadcast(vectors.cpu()), strict=True)
        self._set_starts({name: start.split(list(self.bank.embedding_widths), dim=1) for name, start in starts})

    def _set_starts(self, starts: Mapping[str, Sequence[Tensor]]) -> None:
        """Start tokens at vectors, those from embedding files excepted."""
        assert self.bank is not None
        for name, vectors in starts.items():
            if name not in self.loaded:
                self.bank.set(name, vectors)


def _name(classifier: str | TimmClassifier) -> str:
    return classifier if isinstance(classifier, str) else classifier.pretrained
