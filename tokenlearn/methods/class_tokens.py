"""Discriminative class tokens (Schwartz et al., ICCV 2023, https://arxiv.org/abs/2303.17155)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm import trange  # type: ignore[import-untyped]

from tokenlearn.data.prompts import PROMPT_KINDS, PromptBatch, PromptDataModule, PromptKind
from tokenlearn.diffusion import GradientChain, sample_full_chain
from tokenlearn.diffusion.full_chain import REVERSIBLE
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.losses import class_cross_entropy
from tokenlearn.methods.concepts import SemanticEdit, check_steps, check_tokens
from tokenlearn.methods.learning import TokenLearning, adamw, guide_and_judge
from tokenlearn.metrics import ClassAccuracy, Report, is_classified_as, wilson_interval
from tokenlearn.models import DiffusionBackbone, TimmClassifier
from tokenlearn.tokens import input_embedding, load_embedding, whole_words, with_vectors, word_ids
from tokenlearn.tokens.class_initialisation import mean_gradients

_PICTURE_COLUMNS = 8
_SEARCH_BATCH = 16
_SHORTLIST = 4
"""Words of each class that are compared with one another, and pictures that they are compared by."""


class ClassTokens(TokenLearning):
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
        initial_words: word or words whose embedding a token starts from; ``{}`` is the class's name. Null starts each
            token from the word of the vocabulary whose pictures the guide takes for the class most of all.
        search_words: how many words are tried for null. Of a larger vocabulary, those are taken that the gradient of
            the classes' log-probabilities at the word "a" points to.
        search_steps: sampling steps of the pictures that words are tried with.
        initial_embeddings: embedding files to start from instead, for the tokens that they name.
        num_inference_steps: sampling steps, in training as in validation and test.
        guidance_scale: classifier-free guidance scale.
        scheduler: diffusers scheduler by class name; null for the pipeline's own.
        negative_prompt: prompt of the unconditional branch.
        chain: how the gradient goes through sampling: back through the last ``gradient_steps`` steps (``last_k``), or
            through all of them, see :data:`tokenlearn.diffusion.full_chain.GradientChain`. The exactly invertible ones
            draw the pictures of training by their own solver, those of validation and test are the scheduler's.
        gradient_steps: how many of the last sampling steps ``last_k`` differentiates.
        checkpointing: recompute each differentiated step in the backward pass; memory of one step instead of all.
        detach_inputs: differentiate each step's output for the token only, not through the steps before it (DRTune):
            biased, but half of the cost, and steady where the gradient through the chain explodes.
        edits: semantic guidance of all pictures, in training too: concepts of words or of the tokens themselves, see
            :class:`tokenlearn.methods.concepts.SemanticEdit`.
        hold_norms: after each step, scale token vectors into the range of norms in the vocabulary.
        optimizer: over the token vectors only.
        lr_scheduler: stepped after every optimizer step; null keeps the learning rate.

    Raises:
        UserError: if the classifier or judge lacks a class, is missing, or judge and classifier are the same; or if
            the chain cannot go with ``edits`` or ``detach_inputs``.
    """

    test_after_fit = True

    def __init__(
        self,
        backbone: DiffusionBackbone,
        classifier: str,
        classes: dict[str, str | None],
        judge: str | None = None,
        placeholder: str = "<{}>",
        num_vectors: int = 1,
        initial_words: str | None = "a",
        search_words: int = 256,
        search_steps: int = 10,
        initial_embeddings: list[str] = [],  # noqa: B006 - read only; a list is what YAML shows
        num_inference_steps: int = 20,
        guidance_scale: float = 7.0,
        scheduler: str | None = None,
        negative_prompt: str = "",
        chain: Literal["last_k"] | GradientChain = "last_k",
        gradient_steps: int = 8,
        checkpointing: bool = True,
        detach_inputs: bool = False,
        edits: list[SemanticEdit] = [],  # noqa: B006 - as above
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
        if not classes:
            raise UserError("model.classes is empty; name at least one class of the classifier")
        check_at_least("model", 1, gradient_steps=gradient_steps)
        self.classes = classes
        self.class_names = list(classes)
        self.placeholders = {name: placeholder.format(name.lower().replace(" ", "-")) for name in classes}
        self.classifier, self.judge = guide_and_judge(classifier, judge)
        self._targets = self._label_indices(self.classifier)
        self._judge_targets = None if self.judge is None else self._label_indices(self.judge)
        if chain in REVERSIBLE and (edits or detach_inputs):
            raise UserError(
                f"model.chain {chain} makes each step again on the way back, which neither model.edits nor "
                "model.detach_inputs can go with; set it to checkpointed or last_k"
            )
        self.chain: Literal["last_k"] | GradientChain = chain
        if chain == "checkpointed":
            self.scheduler.set_timesteps(num_inference_steps)
            gradient_steps = len(self.scheduler.timesteps)
        self.gradient_steps, self.checkpointing, self.detach_inputs = gradient_steps, checkpointing, detach_inputs
        self.initial_words, self.search_words, self.search_steps = initial_words, search_words, search_steps

        self.started_from = {name: (initial_words or "a").format(name) for name in classes}
        words = {token: self.started_from[name] for name, token in self.placeholders.items()}
        bank = self.make_bank(words, num_vectors)
        self._given = set()
        for path in initial_embeddings:
            file = load_embedding(path)
            bank.set(file.token, file.vectors)
            self._given.add(file.token)
        self.use_bank(bank)
        check_steps(edits, num_inference_steps)
        check_tokens([edit.concept for edit in edits], bank.placeholders)
        self.semantic_edits = edits
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

    def on_fit_start(self) -> None:
        """Find the words to start from, unless they are given or a checkpoint is gone on with."""
        if self.initial_words is not None or self.resumed:
            return
        assert self.bank is not None
        template = cast(PromptDataModule, self.trainer.datamodule).templates[0]  # type: ignore[attr-defined]
        found = self.trainer.strategy.broadcast(self.find_words(template))
        for name, token in self.placeholders.items():
            if token not in self._given:
                self.started_from[name] = found[name]
                self.bank.set(token, self.vectors_of(found[name], self.bank.num_vectors[token]))
                rank_zero_info(f"{name} starts from '{found[name]}'")

    @torch.no_grad()
    def find_words(self, template: str) -> dict[str, str]:
        """For each class, the word whose pictures the guide takes for the class most of all.

        One picture of each word alone serves all classes; the best few words of a class are then compared as its token
        will be used, before the name of the class.

        Args:
            template: prompt with ``{}`` where the word goes.

        Returns:
            Class to word.
        """
        words = whole_words(self.backbone.tokenizers[0])
        if len(words) > self.search_words:
            words = self._promising(words, template)
        prompts = [template.format(word) for word in words]
        scores = self._log_probabilities(prompts, "Trying words")
        shortlists = scores.topk(min(_SHORTLIST, len(words)), dim=0).indices.T.tolist()
        found = {}
        for index, (name, shortlist) in enumerate(zip(self.class_names, shortlists, strict=True)):
            tried = [template.format(f"{words[place]} {name}") for place in shortlist for _ in range(_SHORTLIST)]
            seeds = list(range(_SHORTLIST)) * len(shortlist)
            means = self._log_probabilities(tried, f"Comparing words for {name}", seeds)[:, index]
            found[name] = words[shortlist[int(means.reshape(len(shortlist), -1).mean(dim=1).argmax())]]
        return found

    def _log_probabilities(self, prompts: Sequence[str], task: str, seeds: Sequence[int] | None = None) -> Tensor:
        """Log-probability (N, classes) that the guide gives to each class on a picture of each of N prompts."""
        seeds = seeds or [0] * len(prompts)
        parts = []
        for start in trange(0, len(prompts), _SEARCH_BATCH, desc=task, leave=False, disable=self.global_rank > 0):
            rows = slice(start, start + _SEARCH_BATCH)
            logits = self.classifier(self.generate(prompts[rows], seeds[rows], num_inference_steps=self.search_steps))
            parts.append(self._of_classes(logits))
        return torch.cat(parts)

    def _of_classes(self, logits: Tensor) -> Tensor:
        """Log-probabilities (B, classes) of this task's classes."""
        targets = torch.tensor(self._targets, device=logits.device)
        rows = logits.repeat_interleave(len(targets), dim=0)
        losses = class_cross_entropy(rows, targets.repeat(len(logits)), self.classifier.multi_label)
        return -losses.reshape(len(logits), -1)

    def _promising(self, words: Sequence[str], template: str) -> list[str]:
        """Words that a step from the word "a" along a class's gradient goes towards, as many for each class."""
        assert self.bank is not None
        token = self.bank.placeholders[0]
        start = torch.cat(self.vectors_of("a", 1), dim=1)
        tables = [input_embedding(encoder).weight for encoder in self.backbone.text_encoders]
        ids = [word_ids(tokenizer, words) for tokenizer in self.backbone.tokenizers]
        table = torch.cat([weight[torch.tensor(rows)] for weight, rows in zip(tables, ids, strict=True)], dim=1)

        def log_probabilities(seeds: Sequence[int]) -> Tensor:
            images = self.generate([template.format(token)] * len(seeds), seeds, self.gradient_steps)
            return self._of_classes(self.classifier(images))

        directions = torch.eye(len(self.class_names), device=self.device)
        features = with_vectors(self.bank, token, log_probabilities)
        gradients = mean_gradients(features, start, directions, [list(range(_SHORTLIST))]).sum(dim=1)
        share = -(-self.search_words // len(self.class_names))
        best = (table.float() @ gradients.T).topk(min(share, len(words)), dim=0).indices
        return [words[index] for index in sorted(set(best.flatten().tolist()))]

    def prompts(self, batch: PromptBatch) -> list[str]:
        """Prompts of a batch."""
        subjects = [
            self.subject(self.class_names[index], kind)
            for index, kind in zip(batch.class_indices, batch.kinds, strict=True)
        ]
        return [template.format(subject) for template, subject in zip(batch.templates, subjects, strict=True)]

    def draw_differentiably(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Images (B, 3, H, W), nominally in [0, 1], for B prompts and seeds, with the gradient of ``chain``."""
        if self.chain == "last_k" or self.chain == "checkpointed":
            return self.generate(prompts, seeds, self.gradient_steps, self.checkpointing, self.detach_inputs)
        latents = sample_full_chain(
            self.backbone,
            self.scheduler,
            self.backbone.initial_latents([torch.Generator().manual_seed(seed) for seed in seeds]),
            self.guidance.conditionings(self.unconditional(), self.backbone.encode_prompts(prompts)),
            self.guidance,
            self.num_inference_steps,
            self.chain,
        )
        return self.backbone.decode_latents(latents)

    def training_step(self, batch: PromptBatch) -> Tensor:
        """Generate a batch, classify it, and return the mean cross-entropy.

        Raises:
            UserError: if the loss is not finite on any device; the last exported embedding stays as it is.
        """
        images = self.draw_differentiably(self.prompts(batch), batch.seeds)
        targets = torch.tensor([self._targets[index] for index in batch.class_indices], device=self.device)
        logits = self.classifier(images)
        loss = self.require_finite(class_cross_entropy(logits, targets, self.classifier.multi_label).mean())
        accuracy = is_classified_as(logits.detach(), targets, self.classifier.multi_label).float().mean()
        size = len(batch.seeds)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size, sync_dist=True)
        self.log("train/guided_accuracy", accuracy, prog_bar=True, batch_size=size, sync_dist=True)
        return loss

    def validation_step(self, batch: PromptBatch) -> dict[str, Any]:
        """Generate on fresh seeds; returns the images and their class names for callbacks."""
        images = self.generate(self.prompts(batch), batch.seeds).clamp(0, 1)
        self._count(self.guided_accuracy, self.classifier, self._targets, images, batch.class_indices)
        if self.judge is not None and self._judge_targets is not None:
            self._count(self.judged_accuracy, self.judge, self._judge_targets, images, batch.class_indices)
        return {"images": images, "rows": [self.class_names[index] for index in batch.class_indices]}

    def on_validation_epoch_end(self) -> None:
        """Log accuracies: the guide's chooses what to keep, the judge's is only shown."""
        self.log_accuracy("val/guided_accuracy", self.guided_accuracy)
        if self.judge is not None:
            self.log_accuracy("val/judged_accuracy", self.judged_accuracy)

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
            "chain": self.chain,
            "gradient_steps": self.gradient_steps,
        }
        for name, token in self.placeholders.items():
            metadata[token] |= {
                "method": "class_tokens",
                "class": name,
                "classifier": self.classifier.pretrained,
                "prompt": f"{token} {name}",
                "config": json.dumps(settings | {"initial_words": self.started_from[name]}),
            }
            if token in self.judged_accuracies and self.judge is not None:
                metadata[token] |= {
                    "judge": self.judge.pretrained,
                    "judged_accuracy": f"{self.judged_accuracies[token]:.4f}",
                }
        return metadata

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the checkpoint, and restore the words that its tokens started from."""
        super().on_load_checkpoint(checkpoint)
        metadata = self.checkpoint_about(checkpoint)["metadata"]
        for name, token in self.placeholders.items():
            if token in metadata:
                self.started_from[name] = json.loads(metadata[token]["config"])["initial_words"]

    def _count(
        self, metric: ClassAccuracy, classifier: TimmClassifier, targets: list[int], images: Tensor, groups: list[int]
    ) -> None:
        wanted = torch.tensor([targets[group % len(self.class_names)] for group in groups], device=self.device)
        correct = is_classified_as(classifier(images), wanted, classifier.multi_label)
        metric.update(correct, torch.tensor(groups, device=self.device))
