"""A tiny Stable Diffusion XL pipeline, built in code."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.tiny import tiny_text_encoder, tiny_tokenizer

WIDTHS = (16, 24)
POOLED_WIDTH = 12


def _text_config(vocab_size: int, width: int) -> CLIPTextConfig:
    """Like the real ones, it names a wrong end of text, for which transformers pools at a row's largest id."""
    config = tiny_text_encoder(vocab_size, width).config
    config.update({"eos_token_id": 2, "projection_dim": POOLED_WIDTH, "num_hidden_layers": 3})
    return config


def tiny_xl_pipeline(folder: Path, prediction_type: str = "epsilon", force_zeros: bool = True) -> Path:
    """Write a pipeline of random weights, 8x8 latents of 16x16 images; the same each time.

    The second tokenizer pads with "!", whose id is 0, as SDXL's does.
    """
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    tiny_tokenizer(folder / "tokenizer_2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = CLIPTextModel(_text_config(len(tokenizer), WIDTHS[0]))
        encoder_2 = CLIPTextModelWithProjection(_text_config(len(tokenizer), WIDTHS[1]))
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(4, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=sum(WIDTHS),
            attention_head_dim=2,
            use_linear_projection=True,
            norm_num_groups=2,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=POOLED_WIDTH + 6 * 8,
        )
        vae = AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
            scaling_factor=0.13025,
        )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoder.eval(),
        text_encoder_2=encoder_2.eval(),
        tokenizer=tokenizer,
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2", pad_token="!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
            prediction_type=prediction_type,
        ),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder
