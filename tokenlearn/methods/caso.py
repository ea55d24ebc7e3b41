"""CASO: dataset-level semantic embeddings of attributes (Chang et al., IJCAI 2025, https://arxiv.org/abs/2505.14254)."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import functional

from tokenlearn.data.images import ImageBatch
from tokenlearn.data.labels import UNKNOWN
from tokenlearn.diffusion import invert
from tokenlearn.diffusion.schedule import add_noise, x0_from_noise
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.guidance import classifier_free_guidance
from tokenlearn.losses import (
    class_cross_entropy,
    class_mean_cosine,
    label_preservation,
    latent_reconstruction,
    probability_error,
)
from tokenlearn.methods.attributes import check_class_names, resolve_attributes
from tokenlearn.methods.base import inverse_of
from tokenlearn.methods.edit_test import Conditions, EditTally, EditTest, directions_of
from tokenlearn.methods.editing import PictureEditor
from tokenlearn.methods.learning import TokenLearning, adamw, guide_and_judge
from tokenlearn.metrics import ClassAccuracy, NeuralCollapse, Report
from tokenlearn.models import DiffusionBackbone
from tokenlearn.tokens import (
    ClassInitialiser,
    TokenBank,
    class_vectors,
    input_embedding,
    load_bank,
    with_vectors,
    word_ids,
)

EditingLoss = Literal["cross_entropy", "probability_error", "class_mean"]
Noising = Literal["forward", "inversion"]
Targets = Literal["any", "missing"]

_STRIP_PICTURES = 4
_COLLAPSE_MEASURES = ("within_class_variability", "equiangularity", "self_duality")


class _Draw(NamedTuple):
    """What is random about a training sample: attribute, class, timestep and noise (C, h, w)."""

    attribute: int
    target: int
    timestep: int
    noise: Tensor


class Caso(TokenLearning):
    """Learn one token per class of each attribute, such that one step of denoising with it shows the class.

    A picture is noised to a timestep, denoised in one step under classifier-free guidance by the token of a class that
    is drawn for it, decoded and classified by a frozen classifier. The editing loss asks for the class, the
    reconstruction loss for everything else to stay. One evaluation of the network with gradient and one without is all
    that a step takes: the released code inverts each picture in 50 steps to read off a timestep that is always the
    same. What is drawn for a picture depends on its place in the training alone, not on the number of processes.

    Args:
        backbone: frozen diffusion model.
        classifier: timm name or folder of the classifier that guides.
        attributes: attributes to learn: a name, to the classifier's labels that are its classes, or to null for the
            presence or absence of the label of that name (tokens ``<smile>`` and ``<no-smile>``).
        judge: timm name or folder of another classifier, which reports; null reports nothing as a result.
        placeholder: how a class gives its token's name; ``{}`` is the class in lower case, with dashes for spaces.
        num_vectors: vectors per token.
        template: prompt around a token; the published prompt is the token alone.
        initial_words: word or words whose embedding tokens start from.
        initialiser: where tokens go from there before training, see :mod:`tokenlearn.tokens.class_initialisation`:
            ``words`` stays.
        initialiser_batches: training batches whose pictures the other initialisers look at.
        initialiser_step: step of ``pull_back``, in units of the vocabulary's median norm.
        initialiser_words: words whose edits are evaluated, per class by ``vocabulary``, in all by ``ridge``.
        collapse_batches: training batches whose labelled pictures tell, before training, the class means of the
            guide's features and how far these have collapsed; without them the guide's head stands in for the means.
        timesteps: timestep to noise pictures to, or the first and last of those of which one is drawn for each
            picture. The published method always takes 401 of 1000.
        targets: which class is drawn for a picture: any of any attribute, each as likely; or one that the picture
            lacks by its labels, the more likely the rarer it is that a picture lacks it. With ``any``, a rare class
            teaches its opposite nothing: hardly a picture has a hat to take off.
        noising: fresh noise, or DDIM inversion in ``num_inference_steps`` steps, to those of their timesteps that are
            in range.
        editing_loss: cross-entropy on logits, the released squared error of the probability, or the cosine to the
            direction of the class mean.
        reconstruction_weight: weight of the squared error in latent space; 0 in the released code.
        preservation_weight: weight of how far all other labels of the guide move from what it says of the same
            prediction without the token, see :func:`tokenlearn.losses.label_preservation`; 0 in the paper.
        preservation_every: of how many pictures one is looked at without the token. A step is the cheaper the more.
        reconstruct_present_only: reconstruct only pictures that show the class already, by their label or, where that
            is not known, by the word of the guide.
        skip_present: leave those pictures out of the editing loss.
        training_guidance_scale: classifier-free guidance scale of the one step.
        hold_norms: after each step, scale token vectors into the range of norms in the vocabulary.
        seed: names what is drawn for the pictures.
        num_inference_steps: sampling steps of generated pictures, and of inversion.
        guidance_scale: classifier-free guidance scale of generated pictures.
        scheduler: diffusers scheduler of generated pictures by class name; null for the pipeline's own.
        negative_prompt: prompt of the unconditional branch.
        optimizer: over the token vectors only.
        lr_scheduler: stepped after every optimizer step; null keeps the learning rate.
        test: how ``test`` edits held-out pictures, see :class:`tokenlearn.methods.edit_test.EditTest`.

    Raises:
        UserError: if classifier or judge lacks a class or is missing, both are the same, or a number is out of range.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        classifier: str,
        attributes: dict[str, list[str] | None],
        judge: str | None = None,
        placeholder: str = "<{}>",
        num_vectors: int = 1,
        template: str = "{}",
        initial_words: str = "a",
        initialiser: ClassInitialiser = "words",
        initialiser_batches: int = 1,
        initialiser_step: float = 1.0,
        initialiser_words: int = 32,
        collapse_batches: int = 8,
        timesteps: int | tuple[int, int] = 401,
        targets: Targets = "any",
        noising: Noising = "forward",
        editing_loss: EditingLoss = "cross_entropy",
        reconstruction_weight: float = 0.1,
        preservation_weight: float = 0.0,
        preservation_every: int = 1,
        reconstruct_present_only: bool = False,
        skip_present: bool = False,
        training_guidance_scale: float = 10.0,
        hold_norms: bool = False,
        seed: int = 0,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.0,
        scheduler: str | None = None,
        negative_prompt: str = "",
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        test: EditTest = EditTest(),  # noqa: B008 - frozen
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
            raise UserError("model.attributes is empty; name at least one attribute of the classifier")
        if template.count("{}") != 1:
            raise UserError(f"model.template '{template}' must have exactly one '{{}}', where the token goes")
        check_at_least(
            "model",
            1,
            initialiser_batches=initialiser_batches,
            initialiser_words=initialiser_words,
            preservation_every=preservation_every,
        )
        check_at_least(
            "model",
            0,
            collapse_batches=collapse_batches,
            reconstruction_weight=reconstruction_weight,
            preservation_weight=preservation_weight,
            seed=seed,
        )
        self.classifier, self.judge = guide_and_judge(classifier, judge)
        self.attributes = resolve_attributes(attributes, self.classifier, placeholder)
        self.judge_attributes = [] if self.judge is None else resolve_attributes(attributes, self.judge, placeholder)
        self.test_settings = test
        self.report: Report | None = None
        self._tally: EditTally | None = None
        self.template, self.seed, self.noising = template, seed, noising
        self.targets: Targets = targets
        self.initial_words, self.initialiser, self.initialiser_step = initial_words, initialiser, initialiser_step
        self.initialiser_batches, self.initialiser_words = initialiser_batches, initialiser_words
        self.collapse_batches = collapse_batches
        self.training_guidance_scale = training_guidance_scale
        self.editing_loss: EditingLoss = editing_loss
        self.reconstruction_weight, self.reconstruct_present_only = reconstruction_weight, reconstruct_present_only
        self.preservation_weight, self.preservation_every = preservation_weight, preservation_every
        self.skip_present = skip_present
        self._inverse = inverse_of(self.scheduler)
        self._inverse.set_timesteps(num_inference_steps)
        self.timesteps = self._checked_timesteps(timesteps)

        self._classes = [(index, k) for index, item in enumerate(self.attributes) for k in range(len(item.classes))]
        self.tokens = [token for attribute in self.attributes for token in attribute.placeholders]
        self.use_bank(self.make_bank(dict.fromkeys(self.tokens, initial_words), num_vectors))
        self.directions = [attribute.directions for attribute in self.attributes]
        self.class_counts: list[Tensor | None] = [None] * len(self.attributes)
        self.centres = [torch.zeros(self.classifier.head_weight.shape[1])] * len(self.attributes)
        self.guided_accuracy = ClassAccuracy(len(self.tokens))
        self.judged_accuracy = ClassAccuracy(len(self.tokens))

    def _checked_timesteps(self, wanted: int | tuple[int, int]) -> list[int]:
        """The timesteps of which one is drawn for each picture."""
        first, last = (wanted, wanted) if isinstance(wanted, int) else wanted
        most = len(self.backbone.alphas) - 1
        if not 0 < first <= last <= most:
            raise UserError(f"model.timesteps must be from 1 to {most}, the first not above the last, got {wanted}")
        if self.noising == "forward":
            return list(range(first, last + 1))
        reached: list[int] = self._inverse.timesteps.tolist()
        if not (within := [timestep for timestep in reached if first <= timestep <= last]):
            near = sorted(sorted(reached, key=lambda timestep: abs(timestep - first))[:2])
            raise UserError(
                f"model.timesteps {wanted} has none that inversion in {self.num_inference_steps} steps passes; "
                f"take {' or '.join(map(str, near))}, or another number of steps"
            )
        return within

    def on_fit_start(self) -> None:
        """See how far the guide has collapsed, and start the tokens; a resumed run has them from its checkpoint.

        Raises:
            UserError: if classes of the data are others than the model's, or an initialiser has nothing to go by.
        """
        self._check_class_names()
        # As in training, so that pictures and features are those that the tokens will meet.
        with torch.no_grad(), self.trainer.precision_plugin.train_step_context():
            self._measure_collapse()
            if self.initialiser != "words" and not self.resumed:
                self._start_tokens(self.initialiser)

    def training_step(self, batch: ImageBatch) -> Tensor:
        """Edit every picture in one step towards a class drawn for it, and return the mean of the weighted losses.

        Raises:
            UserError: if the loss is not finite on any device.
        """
        latents = self.clean_latents(batch)
        shown = self._shown(batch, latents)
        positions = self.sample_positions(len(latents))
        draws = [
            self._draw(position, own, latents.shape[1:])
            for position, own in zip(positions, shown.tolist(), strict=True)
        ]
        timesteps = torch.tensor([draw.timestep for draw in draws], device=self.device)
        targets = torch.tensor([draw.target for draw in draws], device=self.device)
        tokens = [self.attributes[draw.attribute].placeholders[draw.target] for draw in draws]
        rows = {index: [row for row, draw in enumerate(draws) if draw.attribute == index] for index, *_ in draws}

        noisy = self.noisy_latents(latents, torch.stack([draw.noise for draw in draws]).to(self.device), timesteps)
        with self.backbone.same_latents():
            unconditional = self.unconditional_noise(noisy, timesteps)
            predicted = self.one_step_edit(noisy, timesteps, tokens, unconditional)
        features = self.classifier.features(self.backbone.decode_latents(predicted))
        outputs = self.classifier.classify(features).float()
        editing = latents.new_zeros(len(latents), dtype=torch.float32)
        for index, own in rows.items():
            editing[own] = self._editing_loss(index, features[own], outputs[own], targets[own])
        present = torch.stack([row[draw.attribute] == draw.target for row, draw in zip(shown, draws, strict=True)])
        if self.skip_present:
            editing = editing * ~present
        reconstruction = latent_reconstruction(predicted, latents, present if self.reconstruct_present_only else None)
        loss = editing + self.reconstruction_weight * reconstruction
        parts = {"editing": editing.mean(), "reconstruction": reconstruction.mean()}
        if self.preservation_weight:
            chosen = [row for row, position in enumerate(positions) if position % self.preservation_every == 0]
            preservation = outputs.new_zeros(len(outputs))
            if chosen:  # a process may have none
                unedited = self._unedited_outputs(noisy[chosen], timesteps[chosen], unconditional[chosen])
                preservation = self._preservation_loss(outputs, unedited, chosen, draws)
            loss = loss + self.preservation_weight * preservation
            parts["preservation"] = preservation.mean()
        total = self.require_finite(loss.mean())
        for name, value in {"loss": total, **parts}.items():
            self.log(f"train/{name}", value.detach(), prog_bar=name == "loss", batch_size=len(latents), sync_dist=True)
        return total

    @torch.no_grad()
    def validation_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Any] | None:
        """Edit each picture by every token in one step, always with the same noise.

        An edit counts where the picture does not show the class without it.

        Returns:
            For callbacks, a few pictures of the first batch and all their edits.
        """
        latents = self.clean_latents(batch)
        before = self.backbone.decode_latents(latents).clamp(0, 1)
        noisy, timesteps = self._always_the_same_noise(batch.names, latents)
        observers = [(self.classifier, self.attributes, self.guided_accuracy)]
        if self.judge is not None:
            observers.append((self.judge, self.judge_attributes, self.judged_accuracy))
        outputs_before = [classifier(before) for classifier, *_ in observers]
        images, rows = [before[:_STRIP_PICTURES]], ["picture"]
        with self.backbone.same_latents():
            unconditional = self.unconditional_noise(noisy, timesteps)
            for group, (token, (index, target)) in enumerate(zip(self.tokens, self._classes, strict=True)):
                predicted = self.one_step_edit(noisy, timesteps, [token] * len(noisy), unconditional)
                after = self.backbone.decode_latents(predicted).clamp(0, 1)
                for (classifier, attributes, accuracy), outputs in zip(observers, outputs_before, strict=True):
                    needed = attributes[index].class_index(outputs) != target
                    shown = attributes[index].class_index(classifier(after)) == target
                    accuracy.update(shown[needed], torch.full_like(timesteps, group)[needed])
                images.append(after[:_STRIP_PICTURES])
                rows.append(token)
        if batch_idx > 0:
            return None
        return {"images": torch.cat(images), "rows": [row for row in rows for _ in images[0]]}

    def on_validation_epoch_end(self) -> None:
        """Log accuracies of one-step edits: the guide's chooses what to keep, the judge's is only shown."""
        self.log_accuracy("val/guided_accuracy", self.guided_accuracy)
        if self.judge is not None:
            self.log_accuracy("val/judged_accuracy", self.judged_accuracy)

    def on_test_start(self) -> None:
        """Encode what pictures are edited by; see :class:`tokenlearn.methods.edit_test.EditTally`.

        Raises:
            UserError: without a judge, or if the settings of the test do not fit the attributes or the backbone.
        """
        if self.judge is None:
            raise UserError("test needs a classifier that did not train the tokens; set model.judge")
        settings = self.test_settings
        self._tally = EditTally(
            settings,
            PictureEditor(
                self.backbone,
                settings.num_inference_steps,
                settings.timestep,
                "model.test.timestep",
                settings.inversion,
            ),
            self.unconditional(),
            self._test_conditions(settings),
            self.judge_attributes,
            resolve_attributes({name: None for name in settings.watched if name not in self._class_names}, self.judge),
            self.judge,
            self._test_groups(settings),
        ).to(self.device)

    def test_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Edit held-out pictures, or with the second dataloader those of other kinds, and have them judged."""
        assert self._tally is not None
        latents = self.clean_latents(batch)
        if dataloader_idx == 0:
            self._tally.update(self._clean_images(batch, latents), latents)
        else:
            groups = batch.labels.get(self.test_settings.group_column or "", torch.zeros_like(latents[:, 0, 0, 0]))
            self._tally.update_transfer(self._clean_images(batch, latents), latents, groups.long())

    def on_test_epoch_end(self) -> None:
        """Make the report."""
        assert self._tally is not None
        self.report = self._tally.report()
        for name, value in self.report.summary.items():
            self.log(f"test/{name}", value, rank_zero_only=True)
        self._tally = None

    @property
    def _class_names(self) -> list[str]:
        return [name for attribute in self.attributes for name in attribute.class_names]

    @torch.no_grad()
    def _test_conditions(self, settings: EditTest) -> dict[str, list[Conditions]]:
        """Prompts of each method of the test, encoded; afterwards prompts understand this task's tokens again."""
        assert self.bank is not None
        prompts = dict(zip(self._class_names, map(self.template.format, self.tokens), strict=True))
        conditions = {"caso": self._encoded("this run", prompts)}
        if settings.prompts:
            conditions["prompt editing"] = self._encoded("model.test.prompts", settings.prompts)
        banks: dict[str, tuple[TokenBank, dict[str, str]]] = {}
        if settings.embeddings:
            bank, files = load_bank(settings.embeddings, self.backbone.embedding_widths, self.vocabulary_hash)
            own = {file.metadata.get("class", file.token): file.metadata.get("prompt", file.token) for file in files}
            banks["textual inversion"] = (bank, own)
        if settings.random_tokens:
            banks["random token"] = (self._random_bank(), prompts)
        for method, (bank, own) in banks.items():
            self.backbone.inject(bank.to(self.device))
            try:
                conditions[method] = self._encoded("model.test.embeddings", own)
            finally:
                self.backbone.inject(self.bank)
        return conditions

    def _random_bank(self) -> TokenBank:
        """Tokens of this task's names that nobody learned: Gaussian vectors as long as words are."""
        assert self.bank is not None
        generator = torch.Generator().manual_seed(self.seed)
        bank = TokenBank(self.bank.num_vectors, self.bank.embedding_widths)
        lengths = [sum(norms) / 2 for norms in self._norm_ranges]
        for token, count in bank.num_vectors.items():
            drawn = [torch.randn(count, width, generator=generator) for width in bank.embedding_widths]
            scaled = [length * functional.normalize(part) for length, part in zip(lengths, drawn, strict=True)]
            bank.set(token, scaled)
        return bank

    def _encoded(self, source: str, prompts: Mapping[str, str]) -> list[Conditions]:
        """Conditions for each direction, from prompts by class.

        Raises:
            UserError: if ``source`` has no prompt for a class.
        """
        encoded: list[Conditions] = []
        for direction in directions_of(self.attributes):
            if direction.name not in prompts:
                raise UserError(
                    f"{source} has nothing for class '{direction.name}', only for {', '.join(prompts)}; add it"
                )
            names = self.attributes[direction.attribute].class_names
            opposite = prompts.get(names[0]) if len(names) == 2 else None
            encoded.append(
                Conditions(
                    self.backbone.encode_prompts([prompts[direction.name]]),
                    None if opposite is None else self.backbone.encode_prompts([opposite]),
                )
            )
        return encoded

    def _test_groups(self, settings: EditTest) -> tuple[str, ...]:
        if settings.group_column is None:
            return ("other pictures",)
        known: Mapping[str, tuple[str, ...]] = getattr(getattr(self.trainer, "datamodule", None), "class_names", {})
        if settings.group_column not in known:
            raise UserError(
                f"the data have no label '{settings.group_column}' (model.test.group_column), only "
                f"{', '.join(known) or 'none'}; name its column in data.label_columns"
            )
        return known[settings.group_column]

    @torch.no_grad()
    def noisy_latents(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean latents (B, C, h, w) with noise (B, C, h, w), or inverted instead, to B timesteps."""
        if self.noising == "forward":
            return add_noise(latents, noise, self.backbone.alphas[timesteps], self.backbone.sigmas[timesteps])
        reached: list[Tensor] = []
        invert(
            self.backbone,
            self._inverse,
            latents,
            [self.unconditional()],
            self.num_inference_steps,
            int(timesteps.max()),
            callback=lambda step, inverted: reached.append(inverted),
        )
        steps = [self._inverse.timesteps.tolist().index(timestep) for timestep in timesteps.tolist()]
        return torch.stack([reached[step][row] for row, step in enumerate(steps)])

    @torch.no_grad()
    def unconditional_noise(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Noise (B, C, h, w) as predicted without any token."""
        return self.backbone.predict_noise(noisy, timesteps, self.unconditional().expand(len(noisy)))

    def one_step_edit(self, noisy: Tensor, timesteps: Tensor, tokens: Sequence[str], unconditional: Tensor) -> Tensor:
        """Clean latents as predicted in one step from noisy ones, under guidance by tokens; differentiable by these.

        Args:
            noisy: (B, C, h, w) latents with noise.
            timesteps: (B,) its levels.
            tokens: B placeholders.
            unconditional: (B, C, h, w), see :meth:`unconditional_noise`.

        Returns:
            (B, C, h, w).
        """
        prompts = [self.template.format(token) for token in tokens]
        conditional = self.backbone.predict_noise(noisy, timesteps, self.backbone.encode_prompts(prompts))
        guided = classifier_free_guidance(unconditional, conditional, self.training_guidance_scale)
        return x0_from_noise(noisy, guided, self.backbone.alphas[timesteps], self.backbone.sigmas[timesteps])

    def token_metadata(self) -> dict[str, dict[str, str]]:
        """Method, attribute, class and training settings of each token."""
        metadata = super().token_metadata()
        settings = {
            "timesteps": [self.timesteps[0], self.timesteps[-1]],
            "targets": self.targets,
            "noising": self.noising,
            "editing_loss": self.editing_loss,
            "reconstruction_weight": self.reconstruction_weight,
            "preservation_weight": self.preservation_weight,
            "preservation_every": self.preservation_every,
            "training_guidance_scale": self.training_guidance_scale,
            "initial_words": self.initial_words,
            "initialiser": self.initialiser,
            "negative_prompt": self.negative_prompt,
        }
        for attribute in self.attributes:
            for name, token in zip(attribute.class_names, attribute.placeholders, strict=True):
                metadata[token] |= {
                    "method": "caso",
                    "attribute": attribute.name,
                    "class": name,
                    "classifier": self.classifier.pretrained,
                    "prompt": self.template.format(token),
                    "config": json.dumps(settings),
                }
        return metadata

    def _editing_loss(self, index: int, features: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.editing_loss == "class_mean":
            return class_mean_cosine(features, targets, self.directions[index], self.centres[index])
        loss: Callable[[Tensor, Tensor], Tensor] = (
            probability_error if self.editing_loss == "probability_error" else class_cross_entropy
        )
        return loss(self.attributes[index].logits(outputs), targets)

    @torch.no_grad()
    def _unedited_outputs(self, noisy: Tensor, timesteps: Tensor, unconditional: Tensor) -> Tensor:
        """The guide's outputs (B, num_outputs) for one step of denoising without a token."""
        alphas, sigmas = self.backbone.alphas[timesteps], self.backbone.sigmas[timesteps]
        predicted = x0_from_noise(noisy, unconditional, alphas, sigmas)
        outputs: Tensor = self.classifier(self.backbone.decode_latents(predicted))
        return outputs.float()

    def _preservation_loss(
        self, outputs: Tensor, unedited: Tensor, chosen: Sequence[int], draws: Sequence[_Draw]
    ) -> Tensor:
        """How far labels moved that are none of the drawn attribute's: (B,), 0 for pictures that are not chosen.

        Those chosen stand for the others too, so that the mean over many pictures is that over all.
        """
        losses = outputs.new_zeros(len(outputs))
        for row, reference in zip(chosen, unedited, strict=True):
            edited = {output for output, _ in self.attributes[draws[row].attribute].classes}
            moved = label_preservation(outputs[row, None], reference[None], edited, self.classifier.multi_label)
            losses[row] = self.preservation_every * moved[0]
        return losses

    @torch.no_grad()
    def _shown(self, batch: ImageBatch, latents: Tensor) -> Tensor:
        """Class (B, attributes) that pictures show: by their labels, else, if a setting needs it, by the guide's word.

        What stays unknown is ``UNKNOWN``.
        """
        unknown = torch.full((len(latents),), UNKNOWN, device=self.device)
        labels = torch.stack([batch.labels.get(item.name, unknown) for item in self.attributes], dim=1)
        needed = self.skip_present or self.reconstruct_present_only
        if needed and (labels == UNKNOWN).any():
            outputs = self.classifier(self._clean_images(batch, latents))
            said = torch.stack([attribute.class_index(outputs) for attribute in self.attributes], dim=1)
            labels = torch.where(labels == UNKNOWN, said, labels)
        return labels

    def _clean_images(self, batch: ImageBatch, latents: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of a batch, decoded where there are only latents."""
        if batch.images is not None:
            return batch.images
        return self.backbone.decode_latents(self.clean_latents(batch) if latents is None else latents).clamp(0, 1)

    def _draw(self, position: int, shown: Sequence[int], shape: torch.Size) -> _Draw:
        """What is random about the sample at a position, whose picture shows these classes of the attributes."""
        rng = np.random.default_rng([self.seed, position])
        if self.targets == "missing":
            weights = np.array(list(itertools.starmap(self._rarity, enumerate(shown))))
            attribute = int(rng.choice(len(shown), p=weights / weights.sum()))
            others = [k for k in range(len(self.attributes[attribute].classes)) if k != shown[attribute]]
            target = others[int(rng.integers(len(others)))]
        else:
            attribute = int(rng.integers(len(self.attributes)))
            target = int(rng.integers(len(self.attributes[attribute].classes)))
        timestep = self.timesteps[int(rng.integers(len(self.timesteps)))]
        return _Draw(attribute, target, timestep, torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)))

    def _rarity(self, attribute: int, label: int) -> float:
        """How rare it is that a picture shows a class of an attribute; 1 if all are as common, or it is not known."""
        counts = self.class_counts[attribute]
        if counts is None or label == UNKNOWN:
            return 1.0
        return float(counts.sum() / (len(counts) * counts[label].clamp(min=1)))

    def _always_the_same_noise(self, names: Sequence[str], latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents with noise that a picture's name decides, at the middle timestep; and the timesteps (B,)."""
        rngs = [np.random.default_rng(zlib.crc32(name.encode())) for name in names]
        noise = [torch.from_numpy(rng.standard_normal(latents.shape[1:], dtype=np.float32)) for rng in rngs]
        timesteps = torch.full((len(latents),), self.timesteps[len(self.timesteps) // 2], device=self.device)
        return self.noisy_latents(latents, torch.stack(noise).to(self.device), timesteps), timesteps

    def _first_batches(self, count: int) -> Iterator[ImageBatch]:
        """This rank's part of the first training batches, from a loader of their own."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if count and datamodule is not None:
            for batch in itertools.islice(datamodule.train_dataloader(), count):
                yield move_data_to_device(batch, self.device)

    def _check_class_names(self) -> None:
        """Refuse data whose class indices are known to mean something else."""
        known = getattr(getattr(self.trainer, "datamodule", None), "class_names", {})
        for attribute in self.attributes:
            fix = f"list those of the model, in its order, in data.label_classes.{attribute.name}"
            check_class_names(attribute, known.get(attribute.name, ()), fix)

    def _measure_collapse(self) -> None:
        """Take class means of the guide's features over labelled pictures for directions, and log how collapsed."""
        # float64 sums, which Apple's GPUs do not have.
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        metrics = {
            attribute.name: NeuralCollapse(
                len(attribute.classes), attribute.directions.shape[1], attribute.directions
            ).to(device)
            for attribute in self.attributes
        }
        for batch in self._first_batches(self.collapse_batches):
            labelled = batch.labels.keys() & metrics.keys()
            if not labelled:
                return
            features = self.classifier.features(self._clean_images(batch)).to(device)
            for name in labelled:
                labels, metric = batch.labels[name].to(device), metrics[name]
                if (largest := int(labels.max())) >= len(metric.counts):
                    raise UserError(
                        f"the data have class {largest} of '{name}', whose {len(metric.counts)} classes in the model "
                        f"are numbered from 0; name all of them in model.attributes.{name}"
                    )
                metric.update(features, labels)
        logged: dict[str, float] = {}
        for index, (name, metric) in enumerate(metrics.items()):
            if not metric.update_called:
                continue
            try:
                found = metric.compute()
            except UserError as error:
                rank_zero_warn(f"the guide's head stands in for the class means of '{name}': {error}")
                continue
            self.class_counts[index] = found.counts
            self.directions[index] = found.class_directions.float()
            self.centres[index] = found.global_mean.float()
            logged |= {f"collapse/{measure}/{name}": float(getattr(found, measure)) for measure in _COLLAPSE_MEASURES}
        if logged:
            for logger in self.loggers:
                logger.log_metrics(logged, step=self.global_step)
            for measure in _COLLAPSE_MEASURES:
                values = [value for key, value in logged.items() if key.startswith(f"collapse/{measure}/")]
                rank_zero_info(f"guide's {measure.replace('_', ' ')}: {np.mean(values):.3f} (0 if collapsed)")

    def _start_tokens(self, initialiser: ClassInitialiser) -> None:
        """Move the tokens from their word to where the directions of their classes point to."""
        assert self.bank is not None
        batches: list[tuple[Tensor, Tensor, Tensor]] = []
        for batch in self._first_batches(self.initialiser_batches):
            noisy, timesteps = self._always_the_same_noise(batch.names, self.clean_latents(batch))
            # All ranks look at the pictures of all, as one process would.
            gathered = cast(Tensor, self.all_gather(noisy)).reshape(-1, *noisy.shape[1:])
            parts = torch.split(gathered, len(noisy))
            batches += [(part, timesteps, self.unconditional_noise(part, timesteps)) for part in parts]
        token = self.tokens[0]  # all start from the same vectors

        def features(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            noisy, timesteps, unconditional = batch
            predicted = self.one_step_edit(noisy, timesteps, [token] * len(noisy), unconditional)
            return self.classifier.features(self.backbone.decode_latents(predicted))

        vectors = class_vectors(
            initialiser,
            torch.cat(self.bank.get(token), dim=1),
            torch.cat([direction.to(self.device) for direction in self.directions]),
            with_vectors(self.bank, token, features),
            batches,
            torch.cat([input_embedding(encoder).weight for encoder in self.backbone.text_encoders], dim=1),
            word_ids(self.backbone.tokenizers[0]),
            self.initialiser_step,
            self.initialiser_words,
        )
        for name, own in zip(self.tokens, self.trainer.strategy.broadcast(vectors.cpu()), strict=True):
            self.bank.set(name, own.split(list(self.bank.embedding_widths), dim=1))
