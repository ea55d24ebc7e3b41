"""Discriminative class tokens (Schwartz et al., ICCV 2023, https://arxiv.org/abs/2303.17155)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from tokenlearn.data.batches import PromptBatch, PromptKind
from tokenlearn.data.interfaces import ClassConsumer, PromptTemplates, data_of
from tokenlearn.diffusion import Gradient, LastK, OneStep, ReversibleSolver
from tokenlearn.errors import UserError
from tokenlearn.guidance import GuidanceRule, check_tokens
from tokenlearn.losses.objective import Objective, as_objective
from tokenlearn.metrics.group_scores import GroupScores
from tokenlearn.models import DiffusionBackbone
from tokenlearn.objectives import ClassifierLoss, ObjectiveSum, require_judge_differs
from tokenlearn.pipeline import Sampling
from tokenlearn.processes import of_all_processes
from tokenlearn.tokens.checkpoint import checkpoint_about
from tokenlearn.tokens.settings import TokenSettings, check_distinct
from tokenlearn.training.base import TokenTraining, adamw, check_gradient
from tokenlearn.training.hard_classes import HardClasses
from tokenlearn.training.one_step_images import OneStepImages
from tokenlearn.training.word_search import WordSearch, find_words

_ONE_STEP_KEY = "one_step"
_HARD_CLASSES_KEY = "hard_classes"


class ClassTokens(TokenTraining, ClassConsumer):
    """Learn one token per class, such that images of prompts with the token lower an objective.

    Images are generated from noise with prompts that contain the token, an objective (as published, the cross-entropy
    of a frozen classifier) rates them, and its gradient goes back through the sampler to the token's vectors
    (section 3 of the paper):

        min over v of E L(x_0(z_T, c(y, v)), class),    z_T ~ N(0, I)

    over prompts y. The paper differentiates the last sampling step only, ``LastK(1)``. More steps give a gradient that
    also reaches the early steps, at more cost; which number learns best depends on the model.

    Args:
        backbone: frozen diffusion model.
        classes: names of the classes; or each name with a phrase that describes the class without its article, or
            null. Only evaluations use the description, as a baseline.
        objective: loss of an image and its class, such as :class:`ClassifierLoss`, or ``CLIPTextLoss`` with the text
            ``a {}``; of a list, the sum. Objectives without a target ignore the class.
        judge: objective with another model, whose score is reported; null reports the guiding objective only.
        tokens: settings of the tokens. With ``initial_words`` null, the token of each class starts from the word whose
            images have the lowest loss for the class.
        search: settings of the search for this word.
        sampling: settings of the sampler, in training as in validation. The concepts of semantic guidance may be the
            tokens themselves.
        solver: solver of the training images; null for that of ``sampling``.
        guidance: guidance rule of the training images, or the scale of classifier-free guidance; null for that of
            ``sampling``. A lower scale than that of the images to come gives a gradient with less noise.
        gradient: how the gradient goes back through the sampler.
        hard_classes: share of the training images whose classes are drawn in proportion to their recent losses, from 0
            to 1; the other images are shared out evenly among the classes.
        optimizer: over the token vectors only.
        lr_scheduler: stepped after every optimizer step; null keeps the learning rate.

    Attributes:
        classes: class name to description or None.
        class_names: class names in the order of class indices.
        placeholders: class name to token.
        objective, judge, search, solver, gradient: as given.
        hard_classes: recent losses of the classes, by which their images are drawn.
        training_pipeline: ``pipeline`` with the guidance of the training images.
        started_from: class name to the word or words from which its token started.
        judged_accuracies: token to mean score by the judge, for its embedding file; evaluations fill it in.

    Raises:
        UserError: if there is no class, two classes have the same token, the objective or the judge lacks a class, the
            judge has a model of the objective, a share is out of range, or gradient, solver and guidance do not go
            together.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        classes: dict[str, str | None] | list[str],
        objective: Objective | list[Objective],
        *,
        judge: Objective | None = None,
        tokens: TokenSettings = TokenSettings(),  # noqa: B008 - frozen
        search: WordSearch = WordSearch(),  # noqa: B008 - frozen
        sampling: Sampling = Sampling(steps=20, guidance=7.0),  # noqa: B008 - frozen
        solver: ReversibleSolver | None = None,
        guidance: GuidanceRule | float | None = None,
        gradient: Gradient = OneStep(),  # noqa: B008 - frozen
        hard_classes: float = 0.5,
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(backbone, tokens=tokens, sampling=sampling, optimizer=optimizer, lr_scheduler=lr_scheduler)
        if not classes:
            raise UserError("model.classes is empty; name at least one class")
        self.classes: dict[str, str | None] = classes if isinstance(classes, dict) else dict.fromkeys(classes)
        self.class_names = list(self.classes)
        self.placeholders = {name: tokens.name(name) for name in self.class_names}
        check_distinct([(f"class '{name}'", token) for name, token in self.placeholders.items()])
        self.objective, self.judge = as_objective(objective), judge
        self.objective.check(self.class_names)
        if judge is not None:
            require_judge_differs(judge, self.objective)
            judge.check(self.class_names)
            if not judge.has_score:
                raise UserError("the terms of model.judge have scores of different kinds; name one objective as judge")
        self.search, self.solver, self.gradient = search, solver, gradient
        training = sampling if guidance is None else dataclasses.replace(sampling, guidance=guidance)
        check_gradient(gradient, solver or sampling.solver, training.rule)
        backbone.make_solver(solver or sampling.solver, sampling.steps)

        self.started_from = tokens.words_of(self.class_names)
        bank = self.make_bank({token: self.started_from[name] for name, token in self.placeholders.items()})
        check_tokens([*sampling.rule.concept_prompts, *training.rule.concept_prompts], bank.placeholders)
        self.hard_classes = HardClasses(len(self.class_names), hard_classes)
        self.guided_losses = GroupScores(len(self.class_names))
        self.guided_scores = GroupScores(len(self.class_names))
        self.judged_scores = GroupScores(len(self.class_names))
        self.judged_accuracies: dict[str, float] = {}
        self.use_bank(bank)
        self.training_pipeline = self.pipeline.with_sampling(guidance=training.guidance)
        self._one_step = OneStepImages(gradient, self.prompts) if isinstance(gradient, OneStep) else None

    @property
    def class_descriptions(self) -> Mapping[str, str | None]:
        """See :class:`ClassConsumer`."""
        return self.classes

    @property
    def monitor(self) -> tuple[str, Literal["max", "min"]]:
        """See :class:`tokenlearn.token_task.TokenTask`: the objective's loss.

        Accuracies of the few images of a validation are often equal, and the first of equal ones would be kept.
        """
        return "val/loss", "min"

    def subject(self, name: str, kind: PromptKind, words: Mapping[str, str] = MappingProxyType({})) -> str:
        """The phrase for a class in a template: its name, its description, or its name after a token or words.

        Args:
            name: class name.
            kind: way of writing the class.
            words: class name to word, for the kind ``word``.

        Raises:
            UserError: if the class has no description.
        """
        if kind == "name":
            return name
        if kind == "token":
            return f"{self.placeholders[name]} {name}"
        if kind == "start":
            return f"{self.started_from[name]} {name}"
        if kind == "word":
            return f"{words[name]} {name}"
        description = self.classes[name]
        if description is None:
            raise UserError(f"class '{name}' has no description; set model.classes.{name}")
        return description

    def prompts(self, batch: PromptBatch, words: Mapping[str, str] = MappingProxyType({})) -> list[str]:
        """Prompts (B) of a batch; ``words`` as in :meth:`subject`."""
        subjects = [
            self.subject(self.class_names[index], kind, words)
            for index, kind in zip(batch.class_indices, batch.kinds, strict=True)
        ]
        return [template.format(subject) for template, subject in zip(batch.templates, subjects, strict=True)]

    def targets(self, batch: PromptBatch) -> list[str]:
        """Class names (B) of a batch."""
        return [self.class_names[index] for index in batch.class_indices]

    def on_fit_start(self) -> None:
        """Search for the words to start from, unless the settings or a checkpoint give the start."""
        if self.token_settings.initial_words is not None or self.resumed:
            return
        assert self.bank is not None
        template = data_of(self.trainer, PromptTemplates).templates[0]
        with self.trainer.precision_plugin.train_step_context():  # images as they will be in training
            best = self.best_words(template, progress=self.global_rank == 0)
        found = self.trainer.strategy.broadcast(best)
        for name, token in self.placeholders.items():
            if token not in self.loaded:
                self.started_from[name] = found[name]
                self.bank.set(token, self.vectors_of(found[name], self.bank.num_vectors[token]))
                rank_zero_info(f"{name} starts from '{found[name]}'")

    def best_words(self, template: str, *, progress: bool = True) -> dict[str, str]:
        """Class to the word of the vocabulary whose images have the lowest loss, see :func:`find_words`.

        Args:
            template: prompt with ``{}`` where the word goes.
            progress: whether to show progress bars.
        """
        # The preselection differentiates the sampler, which OneStep does not.
        gradient = LastK(1) if isinstance(self.gradient, OneStep) else self.gradient
        return find_words(
            self.pipeline,
            self.objective,
            self.class_names,
            template,
            search=self.search,
            gradient=gradient,
            solver=self.solver,
            progress=progress,
        )

    def training_images(self, batch: PromptBatch) -> tuple[Tensor, PromptBatch]:
        """Images (B, 3, H, W), nominally in [0, 1], with the gradient of the settings, and the batch they are of."""
        batch = batch._replace(class_indices=self.hard_classes.assign(batch.class_indices, batch.seeds))
        if self._one_step is not None:
            position = self.trainer.fit_loop.total_batch_idx
            images, batch = self._one_step.images(self.training_pipeline, batch, position, self.solver)
        else:
            images = self.training_pipeline.generate(
                self.prompts(batch), batch.seeds, gradient=self.gradient, solver=self.solver
            )
        return images, batch

    def training_step(self, batch: PromptBatch) -> Tensor:
        """Generate a batch and return its mean loss.

        Raises:
            UserError: if the loss is not finite on any device.
        """
        images, batch = self.training_images(batch)
        losses, scores = self._rate(images, self.targets(batch), self.global_step)
        loss = self.require_finite(losses.mean())
        if self.hard_classes.share:
            self.hard_classes.note(losses.detach(), batch.class_indices)
        size = len(batch.seeds)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size, sync_dist=True)
        if scores is not None:
            name = f"train/guided_{self.objective.score_name}"
            self.log(name, scores.mean(), prog_bar=True, batch_size=size, sync_dist=True)
        return loss

    def _rate(self, images: Tensor, targets: list[str], step: int = 0) -> tuple[Tensor, Tensor | None]:
        """Losses (B) of images by the objective, and its scores (B) if it has any."""
        if self.objective.has_score:
            return self.objective.loss_and_score(images, targets, step)
        return self.objective(images, step, targets), None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Tell :class:`HardClasses` the losses of the step, of all processes."""
        super().on_before_optimizer_step(optimizer)
        if not self.hard_classes.share:  # nobody asks for them, and telling them stops a GPU at every step
            return
        of_step = self.hard_classes.take_step().to(self.device, torch.float32)  # not every device has float64
        of_step = self.trainer.strategy.reduce(of_step, reduce_op="sum")
        self.hard_classes.update(*of_step.double().cpu())

    @torch.no_grad()
    def validation_step(self, batch: PromptBatch) -> dict[str, Any]:
        """Generate with the solver of ``sampling`` on held-out seeds.

        Returns:
            Images (B, 3, H, W) in [0, 1] and their class names as ``rows``, for callbacks.
        """
        images = self.pipeline.generate(self.prompts(batch), batch.seeds).clamp(0, 1)
        targets, groups = self.targets(batch), torch.tensor(batch.class_indices, device=self.device)
        losses, scores = self._rate(images, targets)
        self.guided_losses.update(losses, groups)
        if scores is not None:
            self.guided_scores.update(scores, groups)
        if self.judge is not None:
            self.judged_scores.update(self.judge.score(images, targets), groups)
        return {"images": images, "rows": targets}

    def on_validation_epoch_end(self) -> None:
        """Log the means over classes: the objective's loss chooses the best tokens, all else only reports."""
        self.log_group_mean("val/loss", self.guided_losses)
        if self.objective.has_score:
            self.log_group_mean(f"val/guided_{self.objective.score_name}", self.guided_scores)
        if self.judge is not None:
            self.log_group_mean(f"val/judged_{self.judge.score_name}", self.judged_scores)

    def token_metadata(self) -> dict[str, dict[str, str]]:
        """Method, class, objective, settings and, once evaluated, judged score of each token."""
        metadata = super().token_metadata()
        terms = list(self.objective) if isinstance(self.objective, ObjectiveSum) else [self.objective]
        guides = [term for term in terms if isinstance(term, ClassifierLoss)]
        about = {"method": "class_tokens", "objective": " + ".join(type(term).__name__ for term in terms)}
        about |= {"classifier": ", ".join(guide.classifier.pretrained for guide in guides)} if guides else {}
        forms = {guide.form for guide in guides} - {"cross_entropy"}
        about |= {"form": ", ".join(sorted(forms))} if forms else {}
        for name, token in self.placeholders.items():
            settings = self._sampling_settings() | {"initial_words": self.started_from[name]}
            metadata[token] |= about | {
                "class": name,
                "prompt": f"{token} {name}",
                "config": json.dumps(settings),
            }
            if token in self.judged_accuracies and self.judge is not None:
                metadata[token] |= {
                    "judge": ", ".join(self.judge.models()),
                    f"judged_{self.judge.score_name}": f"{self.judged_accuracies[token]:.4f}",
                }
        return metadata

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the recent losses of the classes, and the batch whose latents are in use, of every process."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_HARD_CLASSES_KEY] = self.hard_classes.state()
        if self._one_step is not None and self._trainer is not None:
            checkpoint[_ONE_STEP_KEY] = of_all_processes(self._one_step.state())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the checkpoint, and restore what its tokens started from, the recent losses and the latents in use."""
        super().on_load_checkpoint(checkpoint)
        if _HARD_CLASSES_KEY in checkpoint:  # older checkpoints have none
            self.hard_classes.restore(checkpoint[_HARD_CLASSES_KEY])
        states = checkpoint.get(_ONE_STEP_KEY, [])
        if self._one_step is not None and self.global_rank < len(states):
            self._one_step.restore(states[self.global_rank], self.device)
        metadata = checkpoint_about(checkpoint)["metadata"]
        for name, token in self.placeholders.items():
            if token in metadata:
                self.started_from[name] = json.loads(metadata[token]["config"])["initial_words"]

    def _sampling_settings(self) -> dict[str, Any]:
        """Settings of the sampler, as JSON types."""
        sampling = self.sampling
        solver: Any = sampling.solver
        if not isinstance(solver, ReversibleSolver):
            solver = type(self.backbone.make_scheduler(solver)).__name__
        return {
            "steps": sampling.steps,
            "guidance": _guidance_setting(sampling),
            "solver": str(solver),
            "negative_prompt": sampling.negative_prompt,
            "training_solver": None if self.solver is None else str(self.solver),
            "training_guidance": _guidance_setting(self.training_pipeline.sampling),
            "gradient": str(self.gradient),
        }


def _guidance_setting(sampling: Sampling) -> str | float:
    """The scale of classifier-free guidance, or the class of another rule."""
    guidance = sampling.guidance
    return type(guidance).__name__ if isinstance(guidance, GuidanceRule) else guidance
