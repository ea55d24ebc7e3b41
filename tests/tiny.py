"""Tiny real components, built in code: the tests load nothing from the network."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import timm
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tokenlearn.models.classifier import save_classifier

WORDS = (
    "a an the of in on with and photo portrait picture painting sketch drawing face person man woman king queen "
    "wizard pirate chef viking cowboy nurse clown hat glasses beard smiling bald hair curls makeup night old"
)


def tiny_tokenizer(folder: Path, max_length: int = 77, words: str = WORDS) -> CLIPTokenizer:
    """Write a byte-level BPE in CLIP's file layout to ``folder`` and load it; each of ``words`` is one unit."""
    folder.mkdir(parents=True, exist_ok=True)
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words.split()))]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for units in spelled for pair in pairwise(units)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for units in spelled:
            start = 0
            while start < len(units) - 1:
                if (units[start], units[start + 1]) == best:
                    units[start : start + 2] = ["".join(best)]
                start += 1
    alphabet = sorted(ByteLevel.alphabet())
    units = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    units = [*dict.fromkeys(units), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({unit: index for index, unit in enumerate(units)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder)


def tiny_text_encoder(vocab_size: int, width: int = 16) -> CLIPTextModel:
    """A two-layer text encoder whose special ids are the last two of the vocabulary, as in CLIP; same each time."""
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPTextModel(config).eval()


def tiny_pipeline(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Write a Stable Diffusion pipeline of random weights, 8x8 latents of 16x16 images; the same each time."""
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(4, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=2,
        )
        vae = AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
        )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=tiny_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_classifier(folder: Path, label_names: Sequence[str], multi_label: bool = False) -> Path:
    """Write a timm classifier of random weights for 32x32 images, with BatchNorm; the same each time.

    A folder ``judge`` gets other weights than all others.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(folder.name == "judge"))
        model = timm.create_model("test_resnet", num_classes=len(label_names))
    data_config = {"input_size": (3, 32, 32), "crop_pct": 0.9, "interpolation": "bicubic"}
    return save_classifier(model, folder, label_names, multi_label, data_config)


def write_image_config(
    folder: Path, name: str, model: dict, data: dict | None = None, trainer: dict | None = None, **sections: dict
) -> str:
    """Write ``NAME.yaml``, the config of a short fit on the labelled images in ``folder / "faces"``."""
    settings = {
        "seed_everything": 0,
        "model": model,
        "data": {
            "class_path": "ImageDataModule",
            "init_args": {
                "source": str(folder / "faces"),
                "labels": {"columns": {"smile": "smile"}},
                "batch_size": 4,
                "batches_per_epoch": 2,
                "held_out": {"validation": 3, "test": 0},
                "num_workers": 0,
            }
            | (data or {}),
        },
        "trainer": {
            "max_steps": 4,
            "accelerator": "cpu",
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        }
        | (trainer or {}),
        "output_dir": str(folder / name),
    } | sections
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return str(path)
