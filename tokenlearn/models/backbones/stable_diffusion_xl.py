"""Adapter of Stable Diffusion XL and SDXL Turbo, and of every other pipeline of their layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tokenlearn.models.backbones.base import pool_at_end_of_text
from tokenlearn.models.backbones.conditioning import Conditioning
from tokenlearn.models.backbones.latent_diffusion import LatentDiffusion
from tokenlearn.models.backbones.loading import load_pipeline
from tokenlearn.models.frozen import Precision
from tokenlearn.tokens.bank import TokenBank


class StableDiffusionXL(LatentDiffusion):
    """A pipeline that diffusers' ``StableDiffusionXLPipeline`` loads, frozen (https://arxiv.org/abs/2307.01952).

    Two text encoders, CLIP-L and CLIP-G, read each prompt, so a learned token has vectors in both. The network also
    takes the size and cropping of the image (section 2.2 of the paper), which are the same for all prompts here.
    There is no refiner.

    The VAE works in float32 whatever ``dtype`` says, also under a caller's autocast, because its activations overflow
    in float16.

    Args:
        pretrained: hub id or folder. No watermark is added to images.
        revision: branch, tag or commit of the hub repository.
        variant: variant of the weight files, such as ``fp16``; null for the plain ones, or for those of ``fp16`` in a
            model that has no others.
        dtype: precision of the network and the text encoders.
        gradient_checkpointing: recompute activations inside of the network and the VAE in the backward pass; less
            memory, about a third more time.
        compile: compile the network with ``torch.compile`` on first use.
        original_size: (height, width) in pixels that the image claims to have had before scaling; small sizes look
            blurred. Null for the size the model was trained for.
        crop_top_left: (top, left) in pixels of the image's corner in the scaled image; (0, 0) centres objects.
        target_size: (height, width) in pixels that the image claims to have. Null for the size the model was trained
            for.

    Raises:
        UserError: if the folder or one of its files is missing or unreadable, the hub cannot provide the model, or the
            model is of another family.
    """

    addition_embed_type = "text_time"
    time_ids: Tensor

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        variant: str | None = None,
        dtype: Precision = "float32",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        original_size: tuple[int, int] | None = None,
        crop_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
    ) -> None:
        from diffusers import StableDiffusionXLPipeline

        pipeline = load_pipeline(
            StableDiffusionXLPipeline,
            pretrained,
            revision,
            variant,
            models=("unet", "vae", "text_encoder", "text_encoder_2"),
            image_encoder=None,
            feature_extractor=None,
            add_watermarker=False,
        )
        super().__init__(
            pretrained=pretrained,
            pipeline=pipeline,
            tokenizers=[pipeline.tokenizer, pipeline.tokenizer_2],
            text_encoders=[pipeline.text_encoder, pipeline.text_encoder_2],
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
        )
        # Captions were dropped in training by zeros, not by the states of an empty text, and guidance needs the same.
        self._zeros_for_empty_prompt = bool(pipeline.config.force_zeros_for_empty_prompt)
        side = self.latent_size * self.vae_scale_factor
        sizes = [*(original_size or (side, side)), *crop_top_left, *(target_size or (side, side))]
        self.register_buffer("time_ids", torch.tensor([sizes], dtype=torch.float32), persistent=False)

    def _encode(self, prompts: Sequence[str], tokens: TokenBank | None) -> Conditioning:
        """See :meth:`DiffusionBackbone.encode_prompts`.

        The states are the inputs of the last layer of each encoder, side by side. The pooled row is the second
        encoder's projection of its last state at the true end of the text. If the pipeline says so, as SDXL's does,
        both are zero for an empty prompt; diffusers does the same for a missing negative prompt.

        Returns:
            Conditioning of B rows, with the (B, 6) ``time_ids``: original height and width, top and left of the crop,
            target height and width.
        """
        states = []
        for index in range(len(self.text_encoders)):
            ids = self.tokenize(prompts, tokens, index)
            output = self.run_text_encoder(ids, tokens, index, output_hidden_states=True)
            states.append(output.hidden_states[-2].float())
        end_of_text = self.tokenizers[-1].eos_token_id
        assert isinstance(end_of_text, int)
        projection = cast(nn.Linear, self.text_encoders[-1].text_projection)
        pooled: Tensor = projection(pool_at_end_of_text(output.last_hidden_state, ids.to(self.device), end_of_text))
        dropped = torch.tensor([self._zeros_for_empty_prompt and not prompt for prompt in prompts], device=self.device)
        return Conditioning(
            torch.cat(states, dim=2).masked_fill(dropped[:, None, None], 0),
            pooled.float().masked_fill(dropped[:, None], 0),
            {"time_ids": self.time_ids.expand(len(prompts), -1)},
        )

    def added_conditions(self, conditioning: Conditioning) -> dict[str, Tensor]:
        """The pooled row, and sizes and cropping."""
        assert conditioning.pooled_prompt_embeds is not None
        return {"text_embeds": conditioning.pooled_prompt_embeds, **conditioning.extra}

    def encode_images(self, images: Tensor) -> Tensor:
        """See :meth:`DiffusionBackbone.encode_images`."""
        with torch.autocast(images.device.type, enabled=False):
            return super().encode_images(images.float())

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See :meth:`DiffusionBackbone.decode_latents`."""
        with torch.autocast(latents.device.type, enabled=False):
            return super().decode_latents(latents.float())
