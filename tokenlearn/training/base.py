"""Base of every task that learns tokens: optimizer over the bank, safety, and places in the training stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tokenlearn.data.batches import ImageBatch
from tokenlearn.diffusion import Gradient, OneStep, Reversible, ReversibleSolver, Stored
from tokenlearn.errors import UserError, reason_of
from tokenlearn.guidance import (
    ClassifierFreeGuidance,
    GuidanceRule,
    SafeGuidance,
    SemanticGuidance,
    require_differentiable,
)
from tokenlearn.models import DiffusionBackbone
from tokenlearn.notices import notice
from tokenlearn.pipeline import Sampling
from tokenlearn.token_task import TokenTask
from tokenlearn.tokens import TokenBank, load_embeddings, vectors_from_words, vocabulary_norm_range
from tokenlearn.tokens.directions import vectors_of_outputs
from tokenlearn.tokens.files.writing import file_names
from tokenlearn.tokens.settings import TokenSettings
from tokenlearn.training.learning_rate import lr_schedule
from tokenlearn.training.optimizer_settings import apply_changes, changes, settings_of

_OPTIMIZER_KEY = "optimizer_settings"


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
        raise UserError(f"{setting} is {gradient!r}; use OneStep, LastK, Detached, Checkpointed, Stored or Reversible")
    if isinstance(gradient, OneStep):
        if not isinstance(rule, ClassifierFreeGuidance):
            raise UserError(
                f"{setting} OneStep predicts images from any noise level, where {type(rule).__name__} depends on the "
                f"steps before; set {guidance_setting} to a scale, or {setting} to LastK"
            )
        if isinstance(solver, ReversibleSolver):
            raise UserError(
                f"{setting} OneStep does not go with solver {type(solver).__name__}; set {solver_setting} to null"
            )
        return
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
        lr_scheduler: stepped after every optimizer step, ReduceLROnPlateau after every validation; None keeps the
            learning rate.

    Attributes:
        token_settings, optimizer, lr_scheduler: as given.
        loaded: placeholders whose vectors are from ``tokens.initial_embeddings``.
        resumed: whether the vectors are from a checkpoint, so that they need no start.
        learns_outputs: whether the task can learn tokens of the output space.

    Raises:
        UserError: if the settings ask for tokens of the output space, which the task cannot learn.
    """

    learns_outputs = False

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
        if tokens.space != "input" and not self.learns_outputs:
            raise UserError(
                f"{type(self).__name__} learns tokens of the input space alone, got tokens.space {tokens.space}; set "
                "it to input, or use Caso"
            )
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
        file_names(words)  # refuses now what would fail after the training
        settings = self.token_settings
        bank = TokenBank(
            dict.fromkeys(words, settings.num_vectors),
            self.backbone.embedding_widths,
            dict.fromkeys(words, settings.space),
        )
        for token, start in words.items():
            bank.set(token, self.vectors_of(start))
        files = load_embeddings(settings.initial_embeddings)
        for file in files:
            if file.space != bank.spaces.get(file.token, file.space):
                raise UserError(
                    f"'{file.path}' has a token of the space {file.space}, this run learns {settings.space}; set "
                    f"tokens.space to {file.space}, or give another file in tokens.initial_embeddings"
                )
            bank.set(file.token, file.vectors)
        self.loaded = frozenset(file.token for file in files)
        return bank

    def vectors_of(self, words: str, num_vectors: int | None = None) -> list[Tensor]:
        """Vectors (num_vectors, width) of words for each text encoder, see :func:`vectors_from_words`.

        In the output space, they lead from the mean output for no words to that for the words.

        Args:
            words: word or words.
            num_vectors: None for the number of vectors in the settings.
        """
        if self.token_settings.space != "input":
            return vectors_of_outputs(self.pipeline, words, self.token_settings.space)
        count = num_vectors or self.token_settings.num_vectors
        encoders = zip(self.backbone.tokenizers, self.backbone.text_encoders, strict=True)
        return [vectors_from_words(words, *encoder, count) for encoder in encoders]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the settings of optimizer and schedule, of which the trainer saves only the state."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_OPTIMIZER_KEY] = settings_of(*self._new_optimizer())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the checkpoint, remember that the tokens need no start, and apply changed settings of the optimizer.

        Raises:
            UserError: see :class:`TokenTask`; or if a changed schedule is over before the checkpoint's step.
        """
        super().on_load_checkpoint(checkpoint)
        self.resumed = True
        fits = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if not fits or _OPTIMIZER_KEY not in checkpoint:
            return
        optimizer, scheduler = self._new_optimizer()
        changed = changes(checkpoint[_OPTIMIZER_KEY], settings_of(optimizer, scheduler))
        if changed:
            apply_changes(checkpoint, checkpoint[_OPTIMIZER_KEY], optimizer, scheduler)
            rank_zero_only(notice)(f"from step {checkpoint['global_step']} on, {'; '.join(changed)}")

    def require_finite(self, loss: Tensor) -> Tensor:
        """The loss, if it is finite on all devices.

        Raises:
            UserError: if the loss is not finite; the last exported embedding files stay as they are.
        """
        if not self.trainer.strategy.reduce_boolean_decision(bool(loss.isfinite())):
            raise UserError(
                f"the loss is not finite at step {self.global_step}; the last exported embedding files stay as they "
                "are: lower the learning rate, clip gradients with --trainer.gradient_clip_val 1, or set "
                "trainer.precision to bf16-mixed or 32-true"
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

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """A step of the optimizer; then hold the vectors in the vocabulary's range of norms, if the settings say so.

        Within the step, so that checkpoints of callbacks, which come after it, have these vectors.

        Raises:
            UserError: if the optimizer cannot make a step with its settings.
        """
        computed = optimizer_closure is None

        def closure() -> Any:  # noqa: ANN401 - the trainer's
            nonlocal computed
            computed = False
            result = None if optimizer_closure is None else optimizer_closure()
            computed = True
            return result

        try:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
        except (ArithmeticError, AssertionError, RuntimeError) as error:
            if not computed:  # the error is the task's own
                raise
            raise UserError(
                f"model.optimizer cannot make a step ({reason_of(error)}); correct its settings, or lower its lr"
            ) from error
        if self.token_settings.hold_norms and self.bank is not None:
            low, high = zip(*self._norm_ranges, strict=True)
            self.bank.renormalise_(low, high)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:  # noqa: ANN401 - Lightning's hook
        """A step of the schedule.

        Raises:
            UserError: if it cannot make one with its settings.
        """
        try:
            super().lr_scheduler_step(scheduler, metric)
        except (ArithmeticError, IndexError, ValueError) as error:
            raise UserError(
                f"model.lr_scheduler cannot make a step ({reason_of(error)}); correct its settings"
            ) from error

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's union of forms
        """Optimizer of the token vectors, and the scheduler of its learning rate."""
        optimizer, scheduler = self._new_optimizer()
        if scheduler is None:
            return optimizer
        schedule = lr_schedule(scheduler, self.monitor, self.trainer.check_val_every_n_epoch)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _new_optimizer(self) -> tuple[Optimizer, LRScheduler | None]:
        assert self.bank is not None
        name = "model.optimizer"
        try:
            optimizer = self.optimizer(self.bank.parameters())
            name = "model.lr_scheduler"
            return optimizer, None if self.lr_scheduler is None else self.lr_scheduler(optimizer)
        except Exception as error:  # of whatever kind the classes of other libraries raise
            raise UserError(f"{name} is not possible ({reason_of(error)}); correct its settings") from error

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the learning rate, and the norm of the gradient of all tokens before it is clipped."""
        if self.bank is None:
            return
        norms = [vectors.grad.norm() for vectors in self.bank.vectors if vectors.grad is not None]
        if norms:
            self.log("train/gradient_norm", torch.stack(norms).norm())
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])

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

    def log_group_mean(self, name: str, metric: GroupMetric) -> None:
        """Log the mean over groups of a metric's means, leaving out empty groups, and reset the metric."""
        sums, counts = metric.compute().unbind(dim=1)
        counted = counts > 0
        self.log(name, (sums[counted] / counts[counted]).mean(), prog_bar=True)
        metric.reset()
