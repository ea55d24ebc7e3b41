"""Draw prompts with learned tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tokenlearn.data.prompts import PromptBatch
from tokenlearn.methods.base import TokenTask
from tokenlearn.models import Conditioning, DiffusionBackbone
from tokenlearn.tokens import TokenBank, load_bank


class Generate(TokenTask):
    """Draw prompts that use tokens, from embedding files or from a checkpoint (``--ckpt_path``).

    Args:
        backbone: frozen diffusion model.
        embeddings: embedding files of any form that :func:`tokenlearn.tokens.load_embedding` reads. A checkpoint's
            tokens take their place.
        num_inference_steps: sampling steps.
        guidance_scale: classifier-free guidance scale.
        scheduler: diffusers scheduler by class name; null for the pipeline's own.
        negative_prompt: prompt of the unconditional branch.

    Raises:
        UserError: if a file cannot be read, has vectors of another width, is for another model, or names a
            token twice.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        embeddings: list[str] = [],  # noqa: B006 - read only; a list is what YAML shows
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        scheduler: str | None = None,
        negative_prompt: str = "",
    ) -> None:
        super().__init__(backbone, num_inference_steps, guidance_scale, scheduler, negative_prompt)
        if embeddings:
            self.use_bank(load_bank(embeddings, backbone.embedding_widths, self.vocabulary_hash)[0])

    def draw(
        self,
        seeds: Sequence[int],
        conditionings: Sequence[Conditioning],
        rule: Callable[[Sequence[Tensor], int], Tensor],
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of B seeds under a guidance rule.

        Args:
            seeds: one per image.
            conditionings: what the rule needs, each of B rows or of one row.
            rule: see :func:`tokenlearn.diffusion.sample`.
        """
        return self.backbone.decode_latents(self.sample_latents(seeds, conditionings, rule)).clamp(0, 1)

    def predict_step(self, batch: PromptBatch) -> dict[str, Any]:
        """Images in [0, 1] with their prompts and seeds."""
        images = self.generate(batch.templates, batch.seeds).clamp(0, 1)
        return {"images": images, "prompts": batch.templates, "seeds": batch.seeds, "indices": batch.class_indices}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the bank of the checkpoint, whatever tokens it has."""
        super().on_load_checkpoint(checkpoint)
        about = self.checkpoint_about(checkpoint)
        self.use_bank(TokenBank(about["num_vectors"], about["embedding_widths"]).to(self.device))
