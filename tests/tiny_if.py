"""A tiny DeepFloyd IF, built in code."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from tests.tiny import WORDS


def tiny_t5_tokenizer(words: str = WORDS) -> T5TokenizerFast:
    """A unigram tokenizer; each of ``words`` is one unit, other words are letters, and ``<`` is unknown, as to T5."""
    pieces = ["<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in sorted(set(words.split())))]
    pieces += ["\u2581", *string.ascii_letters, *"_>,.", *string.digits]
    # Longer pieces cost less than the letters they are made of.
    return T5TokenizerFast(vocab=[(piece, -5.0 if len(piece) > 1 else -8.0) for piece in pieces], extra_ids=0)


def tiny_if_pipeline(folder: Path) -> Path:
    """Write an IF pipeline of random weights for 8x8 images; the same each time."""
    tokenizer = tiny_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer) + 8,  # T5's table has spare rows
                d_model=16,
                d_kv=8,
                d_ff=24,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
                initializer_factor=4.0,
            )
        ).eval()
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=6,  # noise and variance
            block_out_channels=(32, 32),  # blocks of this kind normalise 32 groups
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            encoder_hid_dim=16,
            encoder_hid_dim_type="text_proj",
            cross_attention_dim=32,
            cross_attention_norm="group_norm",
            attention_head_dim=8,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
        )
    pipeline = IFPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=unet,
        scheduler=DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            variance_type="learned_range",
            clip_sample=True,
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=1.5,
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder
