"""A tiny CLIP and aesthetic head, built in code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from tests.tiny import tiny_tokenizer
from tokenlearn.models.aesthetic import build_aesthetic_head, save_aesthetic_head


def tiny_clip(folder: Path, **processing: Any) -> Path:
    """Write a CLIP of random weights for 16x16 images, with 8 features; the same each time.

    ``processing`` are arguments of the image processor, where they differ from resizing and cropping to 16x16.
    """
    tokenizer = tiny_tokenizer(folder, max_length=24)
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 24,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=text | layers, vision_config={"image_size": 16, "patch_size": 8} | layers, projection_dim=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
    model.half().save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**(size | processing)).save_pretrained(folder)
    return folder


def tiny_aesthetic_head(folder: Path, clip: str, hidden_sizes: tuple[int, ...] = (4,)) -> Path:
    """Write an aesthetic head of random weights on 8 features; the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return save_aesthetic_head(build_aesthetic_head(8, hidden_sizes), folder, clip, hidden_sizes)
