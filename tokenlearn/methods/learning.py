"""What every method that learns tokens shares: the optimizer over the bank, safety, and counting accuracies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import AdamW, Optimizer

from tokenlearn.data.images import ImageBatch
from tokenlearn.errors import UserError
from tokenlearn.methods.base import TokenTask
from tokenlearn.metrics import ClassAccuracy
from tokenlearn.models import DiffusionBackbone, TimmClassifier
from tokenlearn.tokens import TokenBank, vectors_from_words, vocabulary_norm_range


def adamw(params: Any) -> AdamW:  # noqa: ANN401 - torch's own type of parameters is private
    """AdamW without weight decay, which would pull tokens to the origin and not to any word."""
    return AdamW(params, lr=2e-2, weight_decay=0.0)


def is_same_model(name: str, other: str) -> bool:
    """Whether two names, or folders however spelled, are of one model."""
    return name == other or (Path(other).is_dir() and Path(other).resolve() == Path(name).resolve())


def guide_and_judge(classifier: str, judge: str | None) -> tuple[TimmClassifier, TimmClassifier | None]:
    """Load the classifier that guides and the one that reports.

    Raises:
        UserError: if one of them cannot be loaded, or both are the same.
    """
    if judge is None:
        return TimmClassifier(classifier), None
    if is_same_model(classifier, judge):
        raise UserError(f"judge and classifier are both '{judge}'; a judge must be another model than the guide")
    return TimmClassifier(classifier), TimmClassifier(judge)


class TokenLearning(TokenTask):
    """A task that trains the vectors of its bank and nothing else.

    Args:
        backbone: frozen diffusion model.
        num_inference_steps: sampling steps.
        guidance_scale: classifier-free guidance scale; 1 is none.
        scheduler: diffusers scheduler by class name; null for the pipeline's own.
        negative_prompt: prompt of the unconditional branch.
        hold_norms: after each step, scale token vectors into the range of norms in the vocabulary.
        optimizer: over the token vectors only.
        lr_scheduler: stepped after every optimizer step; null keeps the learning rate.

    Attributes:
        test_after_fit: whether the test is a quick one, which a fit may end with.
        resumed: whether the tokens are those of a checkpoint, so that they have started already.
    """

    test_after_fit = False

    def __init__(
        self,
        backbone: DiffusionBackbone,
        num_inference_steps: int,
        guidance_scale: float,
        scheduler: str | None,
        negative_prompt: str,
        hold_norms: bool,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__(backbone, num_inference_steps, guidance_scale, scheduler, negative_prompt)
        self.hold_norms, self.optimizer, self.lr_scheduler = hold_norms, optimizer, lr_scheduler
        self.resumed = False
        self._norm_ranges = [vocabulary_norm_range(encoder) for encoder in backbone.text_encoders]

    def make_bank(self, initial_words: dict[str, str], num_vectors: int) -> TokenBank:
        """A bank whose tokens start from words.

        Args:
            initial_words: placeholder to word or words.
            num_vectors: vectors per token.

        Raises:
            UserError: if words are not in the vocabulary, or placeholders are not usable.
        """
        bank = TokenBank(dict.fromkeys(initial_words, num_vectors), self.backbone.embedding_widths)
        for token, words in initial_words.items():
            bank.set(token, self.vectors_of(words, num_vectors))
        return bank

    def vectors_of(self, words: str, num_vectors: int) -> list[Tensor]:
        """Vectors (num_vectors, width) of words for each text encoder, see ``vectors_from_words``."""
        encoders = zip(self.backbone.tokenizers, self.backbone.text_encoders, strict=True)
        return [vectors_from_words(words, *encoder, num_vectors) for encoder in encoders]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the checkpoint, and note that the tokens have started."""
        super().on_load_checkpoint(checkpoint)
        self.resumed = True

    def require_finite(self, loss: Tensor) -> Tensor:
        """The loss, if it is finite on all devices.

        Raises:
            UserError: if it is not; the last exported embedding stays as it is.
        """
        if not self.trainer.strategy.reduce_boolean_decision(bool(loss.isfinite())):
            raise UserError(
                f"the loss is not finite at step {self.global_step}; files exported so far are kept: lower the "
                "learning rate, or clip gradients with --trainer.gradient_clip_val 1"
            )
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

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's union of forms
        """The optimizer gets the token vectors and nothing else."""
        assert self.bank is not None
        optimizer = self.optimizer(self.bank.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def sample_positions(self, batch_size: int) -> range:
        """Places of this batch's samples in the stream of all ranks, which name their random numbers."""
        batches = self.trainer.fit_loop.total_batch_idx
        start = (batches * self.trainer.world_size + self.trainer.global_rank) * batch_size
        return range(start, start + batch_size)

    @torch.no_grad()
    def clean_latents(self, batch: ImageBatch) -> Tensor:
        """Latents (B, C, h, w) of a batch: cached, encoded, or generated."""
        if batch.latents is not None:
            return batch.latents
        if batch.images is not None:
            return self.backbone.encode_images(batch.images)
        return self.generate_latents(batch.prompts, batch.seeds)

    def log_accuracy(self, name: str, metric: ClassAccuracy) -> None:
        """Log the mean over groups of a metric's accuracies, and start it anew."""
        correct, total = metric.compute().unbind(dim=1)
        counted = total > 0
        self.log(name, (correct[counted] / total[counted]).mean(), prog_bar=True)
        metric.reset()
