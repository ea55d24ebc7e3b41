"""What every method shares: a frozen backbone, a token bank, sampling, and checkpoints of the bank alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from diffusers import DDIMInverseScheduler
from torch import Tensor

from tokenlearn.diffusion import sample
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance, SemanticGuidance
from tokenlearn.methods.concepts import SemanticEdit, encode_terms, semantic_guidance
from tokenlearn.models import Conditioning, DiffusionBackbone
from tokenlearn.tokens import TokenBank, vocabulary_hash

CHECKPOINT_KEY = "tokenlearn"


def inverse_of(scheduler: Any) -> Any:  # noqa: ANN401 - diffusers' schedulers share no base class
    """DDIM's steps backwards, from the configuration of the scheduler that will denoise again."""
    inverse_class: Any = DDIMInverseScheduler
    return inverse_class.from_config(scheduler.config)


class TokenTask(L.LightningModule):
    """A task that draws images with a frozen backbone and the tokens of a bank.

    Its state is the bank: checkpoints hold a few kilobytes, and the identity of the backbone they belong to.

    Args:
        backbone: frozen diffusion model.
        num_inference_steps: sampling steps.
        guidance_scale: classifier-free guidance; 1 is none.
        scheduler: diffusers scheduler by class name; null for the pipeline's own.
        negative_prompt: prompt of the unconditional branch.

    Attributes:
        bank: token bank, None until tokens are known.
        semantic_edits: concepts that steer every generated picture, gradients included.
    """

    bank: TokenBank | None

    def __init__(
        self,
        backbone: DiffusionBackbone,
        num_inference_steps: int,
        guidance_scale: float,
        scheduler: str | None = None,
        negative_prompt: str = "",
    ) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold the bank only; on_load_checkpoint checks that they do
        self.backbone = backbone
        self.num_inference_steps = num_inference_steps
        self.guidance = ClassifierFreeGuidance(guidance_scale)
        self.scheduler = backbone.make_scheduler(scheduler, num_inference_steps)
        self.negative_prompt = negative_prompt
        self.vocabulary_hash = vocabulary_hash(backbone.text_encoders[0])
        self.bank = None
        self.semantic_edits: Sequence[SemanticEdit] = ()
        self._unconditional: Conditioning | None = None

    def use_bank(self, bank: TokenBank) -> None:
        """Make the bank this task's state and its placeholders part of prompts."""
        self.backbone.inject(bank)
        self.bank = bank
        self._unconditional = None
        # The frozen stack is the same on all ranks, so DDP neither broadcasts nor watches it.
        frozen = [*self.named_parameters(), *self.named_buffers()]
        names = [name for name, _ in frozen if not name.startswith("bank.")]
        self._ddp_params_and_buffers_to_ignore = names

    def sample_latents(
        self,
        seeds: Sequence[int],
        conditionings: Sequence[Conditioning],
        rule: Callable[[Sequence[Tensor], int], Tensor],
        gradient_steps: int = 0,
        checkpointing: bool = True,
        detach_inputs: bool = False,
        num_inference_steps: int | None = None,
    ) -> Tensor:
        """Sample latents (B, C, h, w) for B seeds under a guidance rule.

        Args:
            seeds: one per sample, of its initial latents and of noise that the scheduler adds.
            conditionings: what the rule needs, each of B rows or of one row.
            rule: guidance rule; this and what follows as in :func:`tokenlearn.diffusion.sample`.
            gradient_steps: how many of the last steps are differentiated.
            checkpointing: whether these are recomputed in the backward pass.
            detach_inputs: whether the gradient stays within each step.
            num_inference_steps: None for the task's own.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample(
            self.backbone,
            self.scheduler,
            self.backbone.initial_latents(generators),
            conditionings,
            rule,
            num_inference_steps or self.num_inference_steps,
            gradient_steps,
            checkpointing,
            detach_inputs,
            generators,
        )

    def generate_latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        gradient_steps: int = 0,
        checkpointing: bool = True,
        detach_inputs: bool = False,
        num_inference_steps: int | None = None,
    ) -> Tensor:
        """Sample latents (B, C, h, w) for B prompts and seeds; see :func:`tokenlearn.diffusion.sample`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and gradient_steps > 0):
            conditions = [
                self.backbone.encode_prompts(prompts),
                *encode_terms(self.backbone, self.semantic_edits),
            ]
        rule: ClassifierFreeGuidance | SemanticGuidance = self.guidance
        if self.semantic_edits:
            rule = semantic_guidance(self.guidance.guidance_scale, self.semantic_edits)
        return self.sample_latents(
            seeds,
            rule.conditionings(self.unconditional(), *conditions),
            rule,
            gradient_steps,
            checkpointing,
            detach_inputs,
            num_inference_steps,
        )

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        gradient_steps: int = 0,
        checkpointing: bool = True,
        detach_inputs: bool = False,
        num_inference_steps: int | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W), nominally in [0, 1], for B prompts and seeds, differentiable as asked."""
        latents = self.generate_latents(
            prompts, seeds, gradient_steps, checkpointing, detach_inputs, num_inference_steps
        )
        return self.backbone.decode_latents(latents)

    def unconditional(self) -> Conditioning:
        """One row for the negative prompt, encoded once: no token is in it."""
        if self._unconditional is None or self._unconditional.prompt_embeds.device != self.backbone.device:
            with torch.inference_mode(False), torch.no_grad():
                self._unconditional = self.backbone.encode_prompts([self.negative_prompt])
        return self._unconditional

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - overloaded in nn.Module
        """The bank's state only."""
        if self.bank is None:
            return {}
        prefix = kwargs.get("prefix", "")
        return self.bank.state_dict(prefix=f"{prefix}bank.")

    def token_metadata(self) -> dict[str, dict[str, str]]:
        """What an embedding file should say about each placeholder besides its vectors."""
        assert self.bank is not None
        common = {"base_model": self.backbone.pretrained, "vocabulary_hash": self.vocabulary_hash}
        return {placeholder: dict(common) for placeholder in self.bank.placeholders}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add which backbone and tokens the state is for, and the random number generators' state."""
        assert self.bank is not None
        checkpoint[CHECKPOINT_KEY] = {
            "base_model": self.backbone.pretrained,
            "vocabulary_hash": self.vocabulary_hash,
            "num_vectors": dict(self.bank.num_vectors),
            "embedding_widths": list(self.bank.embedding_widths),
            "metadata": self.token_metadata(),
        }
        checkpoint["rng"] = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another backbone or without tokens, and restore random number generators.

        Raises:
            UserError: if it is for another backbone or holds no tokens.
        """
        about = self.checkpoint_about(checkpoint)
        if about["vocabulary_hash"] != self.vocabulary_hash:
            raise UserError(
                f"the checkpoint's tokens were learned on '{about['base_model']}', whose text encoder differs from "
                f"that of '{self.backbone.pretrained}'; set model.backbone to the model of the checkpoint"
            )
        if "rng" in checkpoint:
            torch.set_rng_state(checkpoint["rng"]["cpu"].cpu())
            if len(checkpoint["rng"]["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all([state.cpu() for state in checkpoint["rng"]["cuda"]])

    @staticmethod
    def checkpoint_about(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint says about its tokens.

        Raises:
            UserError: if it is not one of this package.
        """
        if CHECKPOINT_KEY not in checkpoint or not any(key.startswith("bank.") for key in checkpoint["state_dict"]):
            raise UserError("the checkpoint holds no learned tokens; give one that 'tokenlearn fit' wrote")
        about: dict[str, Any] = checkpoint[CHECKPOINT_KEY]
        return about
