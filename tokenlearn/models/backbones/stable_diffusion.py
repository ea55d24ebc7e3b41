"""Adapter of Stable Diffusion 1.x and 2.x, and of every other pipeline of their layout."""

from __future__ import annotations

from collections.abc import Sequence

from tokenlearn.models.backbones.base import pool_at_end_of_text
from tokenlearn.models.backbones.conditioning import Conditioning
from tokenlearn.models.backbones.latent_diffusion import LatentDiffusion
from tokenlearn.models.backbones.loading import load_pipeline
from tokenlearn.models.frozen import Precision
from tokenlearn.tokens.bank import TokenBank


class StableDiffusion(LatentDiffusion):
    """A pipeline that diffusers' ``StableDiffusionPipeline`` loads, frozen, for noise, velocity or x0 prediction.

    The VAE stays in float32 whatever ``dtype`` says, because in half precision its activations overflow on some images
    and small gradients of classifiers are lost; only an autocast of the caller changes its precision.

    Args:
        pretrained: hub id or folder. The safety checker is not loaded.
        revision: branch, tag or commit of the hub repository.
        variant: variant of the weight files, such as ``fp16``; null for the plain ones, or for those of ``fp16`` in a
            model that has no others.
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
        from diffusers import StableDiffusionPipeline

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

    def _encode(self, prompts: Sequence[str], tokens: TokenBank | None) -> Conditioning:
        """See :meth:`DiffusionBackbone.encode_prompts`; the pooled row is the state at the true end of the text."""
        ids = self.tokenize(prompts, tokens)
        states = self.run_text_encoder(ids, tokens).last_hidden_state.float()
        end_of_text = self.tokenizers[0].eos_token_id
        assert isinstance(end_of_text, int)
        return Conditioning(states, pool_at_end_of_text(states, ids.to(self.device), end_of_text))
