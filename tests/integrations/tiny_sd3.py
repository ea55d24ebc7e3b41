"""A tiny modular Stable Diffusion 3 pipeline, a flow-matching family, built in code."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ModularPipeline, SD3Transformer2DModel
from diffusers.modular_pipelines import StableDiffusion3AutoBlocks
from transformers import CLIPTextModelWithProjection

from tests.tiny import tiny_text_encoder, tiny_tokenizer

WIDTHS = (16, 24)
POOLED_WIDTH = 12


def tiny_sd3_pipeline(folder: Path) -> ModularPipeline:
    """A pipeline of random weights, 8x8 latents of 16x16 images; the same each time. It has no T5, as SD3 may."""
    components = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for suffix, width in zip(("", "_2"), WIDTHS, strict=True):
            tokenizer = tiny_tokenizer(folder / f"tokenizer{suffix}")
            config = tiny_text_encoder(len(tokenizer), width).config
            config.update({"projection_dim": POOLED_WIDTH, "num_hidden_layers": 3})
            components[f"tokenizer{suffix}"] = tokenizer
            components[f"text_encoder{suffix}"] = CLIPTextModelWithProjection(config).eval()
        components["transformer"] = SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=16,
            pooled_projection_dim=2 * POOLED_WIDTH,
            pos_embed_max_size=8,
        ).eval()
        components["vae"] = AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
            scaling_factor=1.5,
            shift_factor=0.06,
        ).eval()
    pipe = StableDiffusion3AutoBlocks().init_pipeline()
    pipe.update_components(
        **components, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder_3=None, tokenizer_3=None
    )
    return pipe
