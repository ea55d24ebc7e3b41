"""Base of every task that learns tokens: optimizer over the bank, safety, and places in the training stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import AdamW, Optimizer

from tokenlearn.data.batches import ImageBatch
from tokenlearn.diffusion import Gradient, Reversible, ReversibleSolver, Stored
from tokenlearn.errors import UserError
from tokenlearn.guidance import GuidanceRule, SafeGuidance, SemanticGuidance, require_differentiable
from tokenlearn.models import DiffusionBackbone
from tokenlearn.pipeline import Sampling
from tokenlearn.token_task import TokenTask
from tokenlearn.tokens import TokenBank, load_embeddings, vectors_from_words, vocabulary_norm_range
from tokenlearn.tokens.embeddings import embedding_file_names
from tokenlearn.tokens.settings import TokenSettings


def adamw(params: Any) -> AdamW:  # noqa: ANN401 - torch's type of parameters is private
    """AdamW without weight decay, which would pull tokens towards the origin, where no word is."""
    return AdamW(params, lr=2e-2, weight_decay=0.0)


def check_gradient(
    gradient: Gradient,
    solver: str | ReversibleSolver | None,
    rule: GuidanceRule,
    *,
    setting: str = "model.gradient",
    solver_setting: str = "model.solver",
    guidance_setting: str = "model.sampling.guidance",
) -> None:
    """Refuse a gradient that does not go with the solver or the guidance, before any image is generated.

    Args:
        gradient: how the gradient goes back through the sampler.
        solver: solver, a scheduler's name, or None for the scheduler of the pipeline.
        rule: guidance rule.
        setting: name of the gradient's setting in messages.
        solver_setting: name of the solver's setting in messages.
        guidance_setting: name of the rule's setting in messages.

    Raises:
        UserError: naming the gradient and what it does not go with, or a rule without a gradient.
    """
    require_differentiable(rule, guidance_setting)
    kind = type(gradient).__name__
    if not isinstance(gradient, Gradient):
        raise UserError(f"{setting} is {gradient!r}; use LastK, Detached, Checkpointed, Stored or Reversible")
    if isinstance(solver, ReversibleSolver) and not isinstance(gradient, Reversible | Stored):
        raise UserError(
            f"{setting} {kind} does not go with solver {type(solver).__name__}; set it to Reversible, or to "
            "Stored where memory allows"
        )
    if not isinstance(gradient, Reversible):
        return
    if not isinstance(solver, ReversibleSolver):
        raise UserError(
            f"{setting} {kind} needs a reversible solver, got {solver or 'the scheduler of the pipeline'}; set "
            f"{solver_setting} to EDICT, Leapfrog or OBELM, or {setting} to Checkpointed"
        )
    if isinstance(rule, SemanticGuidance | SafeGuidance):
        raise UserError(
            f"{setting} {kind} evaluates each step again on the way back, where {type(rule).__name__} has lost "
            f"its momentum; set {setting} to Stored, or to LastK or Checkpointed with {solver_setting} null"
        )


class GroupMetric(Protocol):
    """A metric with sums and counts of groups, such as :class:`tokenlearn.metrics.ClassAccuracy`."""

    def compute(self) -> Tensor:
        """(G, 2) sum and count of each group."""

    def reset(self) -> None:
        """Forget everything."""


class TokenTraining(TokenTask):
    """A task that trains the vectors of its bank and nothing else.

    A subclass makes its bank with :meth:`make_bank` and hands it to :meth:`use_bank`.

    Args:
        backbone: frozen diffusion model.
        tokens: settings of the tokens.
        sampling: settings of the sampler.
        optimizer: over the token vectors only.
        lr_scheduler: stepped after every optimizer step; None keeps the learning rate.

    Attributes:
        token_settings, optimizer, lr_scheduler: as given.
        loaded: placeholders whose vectors are from ``tokens.initial_embeddings``.
        resumed: whether the vectors are from a checkpoint, so that they need no start.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        *,
        tokens: TokenSettings,
        sampling: Sampling,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__(backbone, sampling)
        self.token_settings, self.optimizer, self.lr_scheduler = tokens, optimizer, lr_scheduler
        self.loaded: frozenset[str] = frozenset()
        self.resumed = False
        self._norm_ranges = [vocabulary_norm_range(encoder) for encoder in backbone.text_encoders]

    def make_bank(self, words: Mapping[str, str]) -> TokenBank:
        """A bank whose tokens start from words, or from the embedding files of the settings.

        Args:
            words: placeholder to word or words.

        Raises:
            UserError: if words are not in the vocabulary, placeholders are not usable or share a file name, or an
                embedding file cannot be read or does not fit its token.
        """
        embedding_file_names(words)  # refuses now what would fail after the training
        bank = TokenBank(dict.fromkeys(words, self.token_settings.num_vectors), self.backbone.embedding_widths)
        for token, start in words.items():
            bank.set(token, self.vectors_of(start))
        files = load_embeddings(self.token_settings.initial_embeddings)
        for file in files:
            bank.set(file.token, file.vectors)
        self.loaded = frozenset(file.token for file in files)
        return bank

    def vectors_of(self, words: str, num_vectors: int | None = None) -> list[Tensor]:
        """Vectors (num_vectors, width) of words for each text encoder, see :func:`vectors_from_words`.

        Args:
            words: word or words.
            num_vectors: None for the number of vectors in the settings.
        """
        count = num_vectors or self.token_settings.num_vectors
        encoders = zip(self.backbone.tokenizers, self.backbone.text_encoders, strict=True)
        return [vectors_from_words(words, *encoder, count) for encoder in encoders]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the checkpoint, and remember that the tokens need no start."""
        super().on_load_checkpoint(checkpoint)
        self.resumed = True

    def require_finite(self, loss: Tensor) -> Tensor:
        """The loss, if it is finite on all devices.

        Raises:
            UserError: if the loss is not finite; the last exported embedding files stay as they are.
        """
        if not self.trainer.strategy.reduce_boolean_decision(bool(loss.isfinite())):
            raise UserError(
                f"the loss is not finite at step {self.global_step}; the last exported embedding files stay as they "
                "are: lower the learning rate, or clip gradients with --trainer.gradient_clip_val 1"
            )
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient of each token apart, so that one class's large gradient does not slow the others."""
        if not gradient_clip_val or gradient_clip_algorithm == "value" or self.bank is None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        gradients = [vectors.grad for vectors in self.bank.vectors if vectors.grad is not None]
        for placeholder in self.bank.placeholders:
            parts = [gradient[self.bank.rows(placeholder)] for gradient in gradients]
            norm = torch.stack([part.norm() for part in parts]).norm()
            for part in parts:
                part.mul_((gradient_clip_val / (norm + 1e-6)).clamp(max=1))

    def on_train_batch_end(self, *args: Any) -> None:  # noqa: ANN401 - no argument is used
        """Hold the vectors in the vocabulary's range of norms, if the settings ask for it."""
        if self.token_settings.hold_norms and self.bank is not None:
            low, high = zip(*self._norm_ranges, strict=True)
            self.bank.renormalise_(low, high)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's union of forms
        """Optimizer of the token vectors, and the scheduler of its learning rate."""
        assert self.bank is not None
        optimizer = self.optimizer(self.bank.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def sample_positions(self, batch_size: int) -> range:
        """Positions of this batch's samples in the stream of all ranks, which seed their random numbers."""
        batches = self.trainer.fit_loop.total_batch_idx
        start = (batches * self.trainer.world_size + self.trainer.global_rank) * batch_size
        return range(start, start + batch_size)

    @torch.no_grad()
    def clean_latents(self, batch: ImageBatch) -> Tensor:
        """Latents (B, C, h, w) of a batch: cached, encoded, or generated."""
        if batch.latents is not None:
            return batch.latents
        if batch.images is not None:
            return self.encode_images(batch.images)
        return self.generate_latents(batch.prompts, batch.seeds)

    def log_accuracy(self, name: str, metric: GroupMetric) -> None:
        """Log the mean over groups of a metric's means, leaving out empty groups, and reset the metric."""
        sums, counts = metric.compute().unbind(dim=1)
        counted = counts > 0
        self.log(name, (sums[counted] / counts[counted]).mean(), prog_bar=True)
        metric.reset()
