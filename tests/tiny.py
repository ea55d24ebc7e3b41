"""Tiny real components, built in code: the tests load nothing from the network."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

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
