"""Adapter of DeepFloyd IF's first stage, and of every other pixel diffusion pipeline of its layout."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from tokenlearn.errors import UserError
from tokenlearn.models.backbones.base import DiffusionBackbone
from tokenlearn.models.backbones.conditioning import Conditioning
from tokenlearn.models.backbones.latent_diffusion import ddpm_process
from tokenlearn.models.backbones.loading import load_pipeline
from tokenlearn.models.frozen import Precision, freeze
from tokenlearn.tokens.bank import TokenBank

_CHANNELS = 3
_MAX_PROMPT_LENGTH = 77  # what the network was trained with; T5 itself has no limit


class DeepFloydIF(DiffusionBackbone):
    """A pipeline that diffusers' ``IFPipeline`` loads, frozen (https://github.com/deep-floyd/IF).

    It follows Imagen (https://arxiv.org/abs/2205.11487): a T5 encoder reads the prompt, and the network works on the
    pixels themselves, so its latents are images in [-1, 1] and no VAE stands between a loss and the network.

    The network also predicts a variance (https://arxiv.org/abs/2102.09672, equation 15). It is left out: guidance and
    deterministic samplers have no use for it, and the DDPM sampler takes the smaller fixed variance instead. All other
    settings of the pipeline's scheduler stay, such as dynamic thresholding (Imagen, section 2.3).

    Prompts are lowered, as in the pipeline. Its optional cleaning of captions is left out: it would take ``<wizard>``
    for HTML.

    Args:
        pretrained: hub id or folder of a first stage. The safety checker and the watermark are not loaded.
        revision: branch, tag or commit of the hub repository.
        variant: variant of the weight files, such as ``fp16``.
        dtype: precision of the network and the text encoder.
        gradient_checkpointing: recompute activations inside of the network in the backward pass; less memory, about a
            third more time.
        compile: compile the network with ``torch.compile`` on first use.

    Raises:
        UserError: if the folder or one of its files is missing or unreadable, the hub cannot provide the model, or the
            model is of another family or a later stage; or if a package that reads its tokenizer is missing.
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
        pipeline = _load(pretrained, revision, variant)
        unet_config = pipeline.unet.config
        if unet_config.in_channels != _CHANNELS:
            raise UserError(
                f"the network of '{pretrained}' takes {unet_config.in_channels} channels, not the {_CHANNELS} of an "
                "image; give a first stage, such as DeepFloyd/IF-I-XL-v1.0"
            )
        size = unet_config.sample_size
        super().__init__(
            pretrained=pretrained,
            process=ddpm_process(pipeline.scheduler, pretrained),
            scheduler=pipeline.scheduler,
            tokenizers=[_lowering(pipeline.tokenizer)],
            text_encoders=[pipeline.text_encoder],
            max_prompt_length=_MAX_PROMPT_LENGTH,
            latent_channels=_CHANNELS,
            latent_size=size if isinstance(size, int) else size[0],
            vae_scale_factor=1,
        )
        self.unet: Any = pipeline.unet
        nn.Module.to(self.unet, getattr(torch, dtype))
        self.text_encoders.to(getattr(torch, dtype))
        if dtype == "float16":  # the sums in T5's feed-forward layers overflow, so transformers exempts them too
            for name, module in self.text_encoders.named_modules():
                if name.endswith(".wo"):
                    module.float()
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        freeze(self)
        if compile:
            self.unet.compile()  # in place, so that the names of the parameters stay

    def _encode(self, prompts: Sequence[str], tokens: TokenBank | None) -> Conditioning:
        """See :meth:`DiffusionBackbone.encode_prompts`; there is no pooled row.

        The encoder does not read the padding, but the network attends to the states there, as it did in training.
        """
        ids = self.tokenize(prompts, tokens)
        mask = (ids != self.tokenizers[0].pad_token_id).to(self.device)
        states = self.run_text_encoder(ids, tokens, attention_mask=mask).last_hidden_state
        return Conditioning(states.float())

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See :meth:`DiffusionBackbone.forward`; without the variance that the network predicts after the noise."""
        dtype = self.unet.dtype
        prompt_embeds = conditioning.prompt_embeds.to(dtype)
        output: Tensor = self.unet(latents.to(dtype), timesteps, prompt_embeds, return_dict=False)[0]
        return output[:, :_CHANNELS].float()

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) from [0, 1] to [-1, 1], float32."""
        return 2 * images.float() - 1

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) from [-1, 1] to [0, 1], float32 and not clamped."""
        return latents.float() / 2 + 0.5


def _load(pretrained: str, revision: str | None, variant: str | None) -> Any:  # noqa: ANN401
    """Load the pipeline; UserError if that fails."""
    from diffusers import IFPipeline

    try:
        return load_pipeline(
            IFPipeline,
            pretrained,
            revision,
            variant,
            models=("unet", "text_encoder"),
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
            requires_safety_checker=False,
        )
    except UserError as error:
        # Without sentencepiece, transformers takes the tokenizer's file for one of tiktoken and asks for that.
        if "tiktoken" in str(error) and find_spec("sentencepiece") is None:
            raise UserError(
                f"the tokenizer of '{pretrained}' is a sentencepiece model; install what reads it: "
                "uv pip install sentencepiece"
            ) from error
        raise


def _lowering(tokenizer: Any) -> Any:  # noqa: ANN401 - reaches into the tokenizer's backend
    """The tokenizer, changed to lower all text as CLIP's tokenizers do, initial words and placeholders included."""
    from tokenizers import normalizers

    if not tokenizer.is_fast:
        raise UserError(f"the {type(tokenizer).__name__} of this transformers is too old; install transformers 5")
    backend = tokenizer.backend_tokenizer
    existing = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *existing])
    return tokenizer
