"""Every method at a size that a run of takes a second, on tiny models of random weights that are built in code."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets  # type: ignore[import-untyped]
import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from PIL import Image

from tests.tiny import tiny_classifier, tiny_pipeline
from tokenlearn.tokens import save_embedding

Command = Literal["fit", "predict"]
Settings = dict[str, Any]

STEPS = 6
CACHE = "latents"
"""Folder of cached latents, below the folder of the tiny files."""

_ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}}
_COSINE = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": STEPS}}
_LEARNING = {"optimizer": _ADAMW, "lr_scheduler": _COSINE}


class TinyMethod(NamedTuple):
    """A method as a command and its config."""

    command: Command
    config: Settings

    def write(self, path: Path) -> Path:
        """Write the config as YAML."""
        path.write_text(yaml.safe_dump(self.config, sort_keys=False))
        return path


def write_tiny_files(folder: Path) -> None:
    """Write models, labelled images, photos and embedding files, the same each time."""
    tiny_pipeline(folder / "pipeline")
    for name in ("guide", "judge"):
        tiny_classifier(folder / "personas" / name, ["ordinary person", "wizard", "pirate"])
        tiny_classifier(folder / "attributes" / name, ["smile", "hat"], multi_label=True)
    rng = np.random.default_rng(0)
    smiles = [index % 2 == 0 for index in range(16)]
    # Bright images smile: between classes that look alike, class means are mere rounding.
    faces = [rng.integers(150 * smile, 150 * smile + 100, (20, 18, 3), dtype=np.uint8) for smile in smiles]
    features = datasets.Features({"image": datasets.Image(), "smile": datasets.Value("bool")})
    rows = {"image": [Image.fromarray(face) for face in faces], "smile": smiles}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder / "faces")
    (folder / "photos").mkdir()
    for index in range(5):
        pixels = rng.integers(0, 255, (20 + 4 * index, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{index}.png")
    generator = torch.Generator().manual_seed(0)
    for token in ("smile", "hat"):
        path = folder / "embeddings" / f"{token}.safetensors"
        save_embedding(path, f"<{token}>", [torch.randn(1, 16, generator=generator)], {})


def tiny_methods(folder: Path) -> dict[str, TinyMethod]:
    """The methods by name; of class tokens, each gradient and what else has a state that a fit must continue.

    Args:
        folder: folder of the tiny files.
    """
    one_step = _class_tokens(
        folder,
        gradient={"class_path": "OneStep", "init_args": {"start": 0.2, "end": 0.8, "reuse": 3}},
        tokens={"initial_words": None, "hold_norms": True},
        search={"words": 4, "steps": 1},
    )
    accumulated = _class_tokens(folder, gradient={"class_path": "LastK", "init_args": {"steps": 2}})
    accumulated["trainer"]["accumulate_grad_batches"] = 2
    accumulated["data"]["init_args"]["batches_per_epoch"] = 4
    within_epochs = _class_tokens(folder, gradient={"class_path": "Checkpointed"}, judge=None)
    within_epochs["trainer"]["val_check_interval"] = 1
    reversible = _class_tokens(
        folder,
        gradient={"class_path": "Reversible"},
        sampling={"steps": 2, "guidance": 3.0, "solver": {"class_path": "EDICT"}},
        judge=None,
    )
    photos, embeddings = str(folder / "photos"), str(folder / "embeddings")
    return {
        "class tokens, OneStep": TinyMethod("fit", one_step),
        "class tokens, LastK": TinyMethod("fit", accumulated),
        "class tokens, Checkpointed": TinyMethod("fit", within_epochs),
        "class tokens, Reversible": TinyMethod("fit", reversible),
        "CASO": TinyMethod("fit", _caso(folder)),
        "textual inversion": TinyMethod("fit", _textual_inversion(folder)),
        "generate": TinyMethod("predict", _generate(folder)),
        "edit": TinyMethod(
            "predict",
            _predict(
                folder,
                "Edit",
                images=photos,
                embeddings=embeddings,
                edits=[{"<smile>": 3}, {"<smile>": 2, "<hat>": -1}],
                interpolations={"<hat>": [0, 2, 4]},
                editing={"timestep": 601, "steps": 5, "inversion": "edit_friendly"},
                paste="always",
            ),
        ),
        "SEGA": TinyMethod(
            "predict",
            _predict(
                folder,
                "Sega",
                prompts=["a portrait"],
                seeds=[1, 2, 3, 4, 5, 6],
                edits=[{"concept": name, "scale": 4.0, "warmup_steps": 1} for name in ("a hat", "<smile>")],
                embeddings=embeddings,
                sampling={"steps": 4, "guidance": 3.0},
                record_guidance=True,
                batch_size=2,
            ),
        ),
        "DOODL": TinyMethod(
            "predict",
            _predict(
                folder,
                "Doodl",
                prompts=["a portrait"],
                seeds=[1, 2, 3, 4],
                objective=_classifier(folder / "personas" / "guide", labels="pirate"),
                judge=_classifier(folder / "personas" / "judge", labels="pirate"),
                sampling={"steps": 3, "guidance": 1.0},
                optimisation={"steps": 4, "noise": 0.1},
                batch_size=2,
            ),
        ),
    }


def _backbone(folder: Path) -> Settings:
    return {"class_path": "StableDiffusion", "init_args": {"pretrained": str(folder / "pipeline")}}


def _classifier(folder: Path, **options: object) -> Settings:
    return {"class_path": "ClassifierLoss", "init_args": {"classifier": str(folder), **options}}


def _fit(model: str, settings: Mapping[str, Any], data: str, data_settings: Mapping[str, Any]) -> Settings:
    config = {
        "seed_everything": 0,
        "model": {"class_path": model, "init_args": dict(settings)},
        "data": {"class_path": data, "init_args": dict(data_settings)},
        "trainer": {
            "max_steps": STEPS,
            "accelerator": "cpu",
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "gradient_clip_val": 1.0,
        },
        "last_checkpoint": {"every_n_minutes": 0},
    }
    return deepcopy(config)  # YAML would write what two configs share as an alias


def _class_tokens(folder: Path, **settings: object) -> Settings:
    options = {
        "backbone": _backbone(folder),
        "classes": {"wizard": "man with a hat", "pirate": None},
        "objective": _classifier(folder / "personas" / "guide"),
        "judge": _classifier(folder / "personas" / "judge"),
        "sampling": {"steps": 2, "guidance": 3.0},
        **_LEARNING,
        **settings,
    }
    data = {
        "templates": ["a photo of a {}", "a portrait of a {}"],
        "batch_size": 2,
        "batches_per_epoch": 2,
        "validation_images": 1,
        "test_images": 1,
        "eval_batch_size": 1,
    }
    return _fit("ClassTokens", options, "PromptDataModule", data)


def _faces(folder: Path, **settings: object) -> Settings:
    return {
        "source": str(folder / "faces"),
        "labels": {"columns": {"smile": "smile"}},
        "batch_size": 4,
        "batches_per_epoch": 2,
        "held_out": {"validation": 3, "test": 2},
        "num_workers": 0,
        **settings,
    }


def _caso(folder: Path) -> Settings:
    options = {
        "backbone": _backbone(folder),
        "classifier": str(folder / "attributes" / "guide"),
        "judge": str(folder / "attributes" / "judge"),
        "attributes": {"smile": None},
        "initialisation": {"kind": "pull_back", "collapse_batches": 2},
        "edit": {"timesteps": [301, 501]},
        **_LEARNING,
    }
    return _fit("Caso", options, "ImageDataModule", _faces(folder, images={"flips": True}))


def _textual_inversion(folder: Path) -> Settings:
    options = {
        "backbone": _backbone(folder),
        "attributes": {"smile": None},
        "tokens": {"placeholder": "<ti-{}>"},
        "sampling": {"steps": 2},
        **_LEARNING,
    }
    cache = {"folder": str(folder / CACHE), "shard_size": 4}
    return _fit("TextualInversion", options, "ImageDataModule", _faces(folder, cache=cache))


def _predict(folder: Path, model: str, **settings: object) -> Settings:
    options = {"backbone": _backbone(folder), **settings}
    return {
        "model": {"class_path": model, "init_args": options},
        "trainer": {"accelerator": "cpu", "logger": False},
    }


def _generate(folder: Path) -> Settings:
    config = _predict(folder, "Generate", embeddings=str(folder / "embeddings"), sampling={"steps": 3})
    prompts = {"prompts": ["a <smile> king", "a portrait with a <hat>"], "seeds": [1, 2, 3, 4], "batch_size": 2}
    return config | {"data": {"class_path": "PromptList", "init_args": prompts}}
