"""Copies of the tiny models with something wrong in them."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def with_json(folder: Path, file: str, **changes) -> Path:
    """The folder, with changed entries of one of its JSON files."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def with_weights(folder: Path, file: str, change) -> Path:
    """The folder, with one of its weight files changed by a function of its tensors."""
    save_file(change(load_file(folder / file)), folder / file, metadata={"format": "pt"})
    return folder
