"""Discriminative class tokens (Schwartz et al., ICCV 2023, https://arxiv.org/abs/2303.17155)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import AdamW, Optimizer

from tokenlearn.data.prompts import PROMPT_KINDS, PromptBatch, PromptKind
from tokenlearn.errors import UserError
from tokenlearn.losses import class_cross_entropy
from tokenlearn.methods.base import TokenTask
from tokenlearn.metrics import ClassAccuracy, Report, is_classified_as, wilson_interval
from tokenlearn.models import DiffusionBackbone, TimmClassifier
from tokenlearn.tokens import TokenBank, load_embedding, vectors_from_words, vocabulary_norm_range

_PICTURE_COLUMNS = 8


def _adamw(params: Any) -> AdamW:  # noqa: ANN401 - torch's own type of parameters is private
    return AdamW(params, lr=2e-2, weight_decay=0.0)


class ClassTokens(TokenTask):
    """Learn one token per class, so that prompts with it draw exactly what a classifier takes for that class.

    Images are generated from noise with prompts that hold the token, a frozen classifier judges them, and the gradient
    of its cross-entropy goes back through the last sampling steps to the token's vectors (section 3 of the paper). The
    paper differentiates the last step only; the gradient is then so weak that small models learn nothing, hence
    ``gradient_steps``.

    Args:
        backbone: frozen diffusion model.
        classifier: timm name or folder of the classifier that guides.
        classes: class of the classifier, to a phrase that describes what it looks like (without its article), or null.
            The phrase is only used by ``test``, as a baseline.
        judge: timm name or folder of another classifier, which reports; null reports nothing as a result.
        placeholder: how a class gives its token's name; ``{}`` is the class in lower case, with dashes for spaces.
        num_vectors: vectors per token.
        initial_words: word or words whose embedding a token starts from.
        initial_embeddings: embedding files to start from instead, for the tokens that they name.
        num_inference_steps: sampling steps, in training as in validation and test.
        guidance_scale: classifier-free guidance scale.
        scheduler: diffusers scheduler by class name; null for the pipeline's own.
        negative_prompt: prompt of the unconditional branch.
        gradient_steps: how many of the last sampling steps are differentiated.
        checkpointing: recompute each differentiated step in the backward pass; memory of one step instead of all.
        hold_norms: after each step, scale token vectors into the range of norms in the vocabulary.
        optimizer: over the token vectors only.
        lr_scheduler: stepped after every optimizer step; null keeps the learning rate.

    Raises:
        UserError: if the classifier or judge lacks a class, is missing, or judge and classifier are the same.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        classifier: str,
        classes: dict[str, str | None],
        judge: str | None = None,
        placeholder: str = "<{}>",
        num_vectors: int = 1,
        initial_words: str = "a",
        initial_embeddings: list[str] = [],  # noqa: B006 - read only; a list is what YAML shows
        num_inference_steps: int = 20,
        guidance_scale: float = 7.0,
        scheduler: str | None = None,
        negative_prompt: str = "",
        gradient_steps: int = 8,
        checkpointing: bool = True,
        hold_norms: bool = False,
        optimizer: OptimizerCallable = _adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(backbone, num_inference_steps, guidance_scale, scheduler, negative_prompt)
        if not classes:
            raise UserError("model.classes is empty; name at least one class of the classifier")
        if gradient_steps < 1:
            raise UserError(f"model.gradient_steps must be at least 1, got {gradient_steps}")
        if judge is not None and _same_model(judge, classifier):
            raise UserError(f"judge and classifier are both '{judge}'; a judge must be another model than the guide")
        self.classes = classes
        self.class_names = list(classes)
        self.placeholders = {name: placeholder.format(name.lower().replace(" ", "-")) for name in classes}
        self.classifier = TimmClassifier(classifier)
        self.judge = None if judge is None else TimmClassifier(judge)
        self._targets = self._label_indices(self.classifier)
        self._judge_targets = None if self.judge is None else self._label_indices(self.judge)
        self.gradient_steps, self.checkpointing = gradient_steps, checkpointing
        self.hold_norms, self.initial_words = hold_norms, initial_words
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler

        words = [
            vectors_from_words(initial_words, tokenizer, encoder, num_vectors)
            for tokenizer, encoder in zip(backbone.tokenizers, backbone.text_encoders, strict=True)
        ]
        bank = TokenBank(dict.fromkeys(self.placeholders.values(), num_vectors), backbone.embedding_widths)
        for token in bank.placeholders:
            bank.set(token, words)
        for path in initial_embeddings:
            file = load_embedding(path)
            bank.set(file.token, file.vectors)
        self.use_bank(bank)
        self._norm_ranges = [vocabulary_norm_range(encoder) for encoder in backbone.text_encoders]

        self.guided_accuracy = ClassAccuracy(len(classes))
        self.judged_accuracy = ClassAccuracy(len(classes))
        self.test_accuracy = ClassAccuracy(len(classes) * len(PROMPT_KINDS))
        self.report: Report | None = None
        self.judged_accuracies: dict[str, float] = {}
        self._pictures: dict[tuple[str, str], list[Tensor]] = {}

    def _label_indices(self, classifier: TimmClassifier) -> list[int]:
        return [classifier.label_index(name) for name in self.class_names]

    def subject(self, name: str, kind: PromptKind) -> str:
        """The phrase for a class that goes into a template: its name, its description, or its token and name.

        Raises:
            UserError: if the class has no description.
        """
        if kind == "name":
            return name
        if kind == "token":
            return f"{self.placeholders[name]} {name}"
        description = self.classes[name]
        if description is None:
            raise UserError(f"class '{name}' has no description; set model.classes.{name}")
        return description

    def prompts(self, batch: PromptBatch) -> list[str]:
        """Prompts of a batch."""
        subjects = [
            self.subject(self.class_names[index], kind)
            for index, kind in zip(batch.class_indices, batch.kinds, strict=True)
        ]
        return [template.format(subject) for template, subject in zip(batch.templates, subjects, strict=True)]

    def training_step(self, batch: PromptBatch) -> Tensor:
        """Generate a batch, classify it, and return the mean cross-entropy.

        Raises:
            UserError: if the loss is not finite on any device; the last exported embedding stays as it is.
        """
        images = self.generate(self.prompts(batch), batch.seeds, self.gradient_steps, self.checkpointing)
        targets = torch.tensor([self._targets[index] for index in batch.class_indices], device=self.device)
        logits = self.classifier(images)
        loss = class_cross_entropy(logits, targets, self.classifier.multi_label).mean()
        if not self.trainer.strategy.reduce_boolean_decision(bool(loss.isfinite())):
            raise UserError(
                f"the loss is not finite at step {self.global_step}; files exported so far are kept: lower the "
                "learning rate, or clip gradients with --trainer.gradient_clip_val 1"
            )
        accuracy = is_classified_as(logits.detach(), targets, self.classifier.multi_label).float().mean()
        size = len(batch.seeds)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size, sync_dist=True)
        self.log("train/guided_accuracy", accuracy, prog_bar=True, batch_size=size, sync_dist=True)
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each token's gradient on its own: one class's outburst must not starve the others of the run."""
        if not gradient_clip_val or gradient_clip_algorithm == "value" or self.bank is None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        gradients = [vectors.grad for vectors in self.bank.vectors if vectors.grad is not None]
        for placeholder in self.bank.placeholders:
            own = [gradient[self.bank.rows(placeholder)] for gradient in gradients]
            norm = torch.stack([part.norm() for part in own]).norm()
            for part in own:
                part.mul_((gradient_clip_val / (norm + 1e-6)).clamp(max=1))

    def on_train_batch_end(self, *args: Any) -> None:  # noqa: ANN401 - nothing of it is used
        """Hold the vectors in the vocabulary's range of norms, if asked."""
        if self.hold_norms and self.bank is not None:
            low, high = zip(*self._norm_ranges, strict=True)
            self.bank.renormalise_(low, high)

    def validation_step(self, batch: PromptBatch) -> dict[str, Any]:
        """Generate on fresh seeds; returns the images and their class names for callbacks."""
        images = self.generate(self.prompts(batch), batch.seeds).clamp(0, 1)
        self._count(self.guided_accuracy, self.classifier, self._targets, images, batch.class_indices)
        if self.judge is not None and self._judge_targets is not None:
            self._count(self.judged_accuracy, self.judge, self._judge_targets, images, batch.class_indices)
        return {"images": images, "rows": [self.class_names[index] for index in batch.class_indices]}

    def on_validation_epoch_end(self) -> None:
        """Log accuracies: the guide's chooses what to keep, the judge's is only shown."""
        self._log_accuracy("val/guided_accuracy", self.guided_accuracy)
        if self.judge is not None:
            self._log_accuracy("val/judged_accuracy", self.judged_accuracy)

    def on_test_start(self) -> None:
        """Check that there is somebody to judge.

        Raises:
            UserError: without a judge.
        """
        if self.judge is None:
            raise UserError("test needs a classifier that did not train the tokens; set model.judge")
        self._pictures = {}

    def test_step(self, batch: PromptBatch) -> None:
        """Generate every kind of prompt and have it judged."""
        assert self.judge is not None
        assert self._judge_targets is not None
        images = self.generate(self.prompts(batch), batch.seeds).clamp(0, 1)
        offsets = [PROMPT_KINDS.index(kind) * len(self.class_names) for kind in batch.kinds]
        groups = [offset + index for offset, index in zip(offsets, batch.class_indices, strict=True)]
        self._count(self.test_accuracy, self.judge, self._judge_targets, images, groups)
        for image, kind, index in zip(images, batch.kinds, batch.class_indices, strict=True):
            row = self._pictures.setdefault((self.class_names[index], kind), [])
            if len(row) < _PICTURE_COLUMNS:
                row.append(image.float().cpu())

    def on_test_epoch_end(self) -> None:
        """Make the report: per class, the judged accuracy of each kind of prompt with its 95 % interval."""
        assert self.judge is not None
        counts = self.test_accuracy.compute().reshape(len(PROMPT_KINDS), len(self.class_names), 2).tolist()
        self.test_accuracy.reset()
        columns = ["class"]
        table: list[list[str | float | None]] = [[name] for name in self.class_names]
        summary: dict[str, float] = {}
        for kind, per_class in zip(PROMPT_KINDS, counts, strict=True):
            columns += [kind, f"{kind}_low", f"{kind}_high", f"{kind}_images"]
            shares = [correct / total if total else None for correct, total in per_class]
            for row, share, (correct, total) in zip(table, shares, per_class, strict=True):
                row += [share, *(wilson_interval(correct, total) if total else (None, None)), total]
            measured = [share for share in shares if share is not None]
            if measured:
                summary[f"mean_accuracy_{kind}"] = sum(measured) / len(measured)
                self.log(f"test/judged_accuracy_{kind}", summary[f"mean_accuracy_{kind}"], rank_zero_only=True)
        renamed = {"mean_accuracy_name": "judged_accuracy_before", "mean_accuracy_token": "judged_accuracy_after"}
        fit_summary = {renamed[name]: value for name, value in summary.items() if name in renamed}
        self.judged_accuracies = {
            self.placeholders[name]: correct / total
            for name, (correct, total) in zip(self.class_names, counts[PROMPT_KINDS.index("token")], strict=True)
            if total
        }
        captions = {"name": "before", "token": "after"}
        picture = [
            (f"{name}: {captions[kind]}", torch.stack(self._pictures[name, kind]))
            for name in self.class_names
            for kind in captions
            if (name, kind) in self._pictures
        ]
        self.report = Report(
            title=f"judged by {self.judge.pretrained}",
            columns=columns,
            rows=table,
            bars=[kind for kind in PROMPT_KINDS if f"mean_accuracy_{kind}" in summary],
            summary=summary,
            fit_summary=fit_summary,
            pictures={"before_after": picture},
        )

    def token_metadata(self) -> dict[str, dict[str, str]]:
        """Method, class and, once known, judged accuracy of each token."""
        metadata = super().token_metadata()
        settings = {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance.guidance_scale,
            "scheduler": type(self.scheduler).__name__,
            "negative_prompt": self.negative_prompt,
            "gradient_steps": self.gradient_steps,
            "initial_words": self.initial_words,
        }
        for name, token in self.placeholders.items():
            metadata[token] |= {
                "method": "class_tokens",
                "class": name,
                "classifier": self.classifier.pretrained,
                "prompt": f"{token} {name}",
                "config": json.dumps(settings),
            }
            if token in self.judged_accuracies and self.judge is not None:
                metadata[token] |= {
                    "judge": self.judge.pretrained,
                    "judged_accuracy": f"{self.judged_accuracies[token]:.4f}",
                }
        return metadata

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's union of forms
        """The optimizer gets the token vectors and nothing else."""
        assert self.bank is not None
        optimizer = self.optimizer(self.bank.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _count(
        self, metric: ClassAccuracy, classifier: TimmClassifier, targets: list[int], images: Tensor, groups: list[int]
    ) -> None:
        wanted = torch.tensor([targets[group % len(self.class_names)] for group in groups], device=self.device)
        correct = is_classified_as(classifier(images), wanted, classifier.multi_label)
        metric.update(correct, torch.tensor(groups, device=self.device))

    def _log_accuracy(self, name: str, metric: ClassAccuracy) -> None:
        correct, total = metric.compute().unbind(dim=1)
        self.log(name, (correct / total.clamp_min(1)).mean(), prog_bar=True)
        metric.reset()


def _same_model(name: str, other: str) -> bool:
    return name == other or (Path(name).is_dir() and Path(name).resolve() == Path(other).resolve())
