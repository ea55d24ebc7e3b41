"""Stable Diffusion 1.x and 2.x, and every other pipeline of their layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline

from tokenlearn.models.backbone import Conditioning, pool_at_end_of_text
from tokenlearn.models.latent_diffusion import LatentDiffusion, Precision
from tokenlearn.models.loading import load_pipeline


class StableDiffusion(LatentDiffusion):
    """A pipeline that diffusers' ``StableDiffusionPipeline`` loads, frozen, for noise, velocity or x0 prediction.

    The VAE stays in float32 whatever ``dtype`` says, because in half precision its activations overflow on some images
    and its gradients lose the little that classifiers send back; only an autocast of the caller changes that.

    Args:
        pretrained: hub id or folder. The safety checker is not loaded.
        revision: branch, tag or commit of the hub repository.
        variant: variant of the weight files, such as ``fp16``.
        dtype: precision of the network and the text encoder.
        gradient_checkpointing: recompute activations inside of the network and the VAE in the backward pass; less
            memory, about a third more time.
        compile: compile the network with ``torch.compile`` on first use.

    Raises:
        UserError: if the folder or one of its files is missing or unreadable, the hub cannot provide the model, or the
            model is of another family.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        variant: str | None = None,
        dtype: Precision = "float32",
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        pipeline = load_pipeline(
            StableDiffusionPipeline,
            pretrained,
            revision,
            variant,
            models=("unet", "vae", "text_encoder"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        super().__init__(
            pretrained=pretrained,
            pipeline=pipeline,
            tokenizers=[pipeline.tokenizer],
            text_encoders=[pipeline.text_encoder],
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
        )

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        """See :meth:`DiffusionBackbone.encode_prompts`; the pooled row is the state at the true end of the text."""
        ids = self.tokenize(prompts)
        learned = not self.learned_ids().isdisjoint(ids.flatten().tolist())
        ids = ids.to(self.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and learned):
            states = self.text_encoders[0](ids).last_hidden_state.float()
        end_of_text = self.tokenizers[0].eos_token_id
        assert isinstance(end_of_text, int)
        return Conditioning(states, pool_at_end_of_text(states, ids, end_of_text))
