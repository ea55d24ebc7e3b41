"""Portraits rendered once into memory-mapped arrays, which the training scripts read at random.

Run on its own to render ahead of time: ``uv run python -m data_prep.portrait_arrays --size 60000``.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from tokenlearn.data.portraits import (
    ATTRIBUTES,
    HAIR_COLORS,
    IMAGE_SIZE,
    PARTS,
    PERSONA_LABELS,
    Scene,
    portrait,
    sample_scene,
)

WORK_FOLDER = Path("work")
_CHUNK = 2000
_NO_HAT = {"a green mohawk", "a rainbow wig", "a round glass helmet"}
_HEADGEAR = {name for name, part in PARTS.items() if part.place == "head"} - _NO_HAT
_ATTRIBUTES_UNCLEAR = _NO_HAT | {"a red ball nose"}
"""Parts that leave open whether an attribute is there."""
_HAIR_LABELS = tuple(f"{color} hair" for color in HAIR_COLORS)
_COLORED_STYLES = {"photo", "painting"}

PORTRAIT_LABELS = (*ATTRIBUTES, *_HAIR_LABELS, "pipe")
"""What the attribute classifiers know: with "gray hair", the hair colours are five classes."""


@dataclass
class PortraitArrays:
    """Rendered portraits.

    Attributes:
        images: uint8 (N, 64, 64, 3).
        labels: bool (N, 15), whether each of ``PORTRAIT_LABELS`` is there; any headgear but a helmet counts as a hat.
        labels_known: bool (N, 15); false where a part or a style leaves it open.
        personas: int64 (N,), index into ``PERSONA_LABELS``.
        captions: N texts.
    """

    images: np.ndarray
    labels: Tensor
    labels_known: Tensor
    personas: Tensor
    captions: list[str]

    def pixels(self, indices: Tensor | list[int]) -> Tensor:
        """Images as float (B, 3, 64, 64) in [0, 1]."""
        chosen = torch.from_numpy(self.images[np.asarray(indices)])
        return chosen.permute(0, 3, 1, 2).contiguous().float() / 255


def _is_shown(scene: Scene, label: str) -> bool:
    if label == "pipe":
        return scene.pipe
    if label in _HAIR_LABELS:
        return not scene.has("gray hair") and label == f"{scene.hair_color} hair"
    return scene.has(label) or (label == "hat" and not scene.parts.isdisjoint(_HEADGEAR))


def _is_known(scene: Scene, label: str) -> bool:
    if label in _HAIR_LABELS:
        return scene.part_at("head") is None and scene.style in _COLORED_STYLES
    return scene.parts.isdisjoint(_ATTRIBUTES_UNCLEAR)


def _render_chunk(job: tuple[Path, int, int, int, Mapping[str, float]]) -> None:
    folder, seed, start, stop, frequencies = job
    if (folder / f"{start}.json").exists():
        return
    images = np.empty((stop - start, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    rows = []
    for index in range(start, stop):
        scene, image, text = portrait(seed, index, **frequencies)
        images[index - start] = np.asarray(image)
        shown = [_is_shown(scene, label) for label in PORTRAIT_LABELS]
        known = [_is_known(scene, label) for label in PORTRAIT_LABELS]
        rows.append([text, shown, known, scene.persona])
    np.save(folder / f"{start}.npy", images)
    (folder / f"{start}.json").write_text(json.dumps(rows))


def portrait_arrays(
    size: int,
    seed: int,
    work_folder: Path = WORK_FOLDER,
    processes: int = 2,
    frequencies: Mapping[str, float] | None = None,
) -> PortraitArrays:
    """Render ``size`` portraits of the stream named by ``seed``, or read them if they were rendered before.

    ``frequencies`` of personas and near misses are those of ``sample_scene``; None takes the world's own.
    """
    frequencies = frequencies or {}
    folder = work_folder / "-".join(
        ["portraits", str(seed), *(f"{frequencies[name]:g}" for name in sorted(frequencies))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder, seed, start, start + _CHUNK, frequencies) for start in range(0, size, _CHUNK)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(_render_chunk, jobs, chunksize=1)
    rows = [row for job in jobs for row in json.loads((folder / f"{job[2]}.json").read_text())][:size]
    captions, labels, known, personas = zip(*rows, strict=True)
    return PortraitArrays(
        images=np.concatenate([np.load(folder / f"{job[2]}.npy") for job in jobs])[:size],
        labels=torch.tensor(labels),
        labels_known=torch.tensor(known),
        personas=torch.tensor([PERSONA_LABELS.index(name) if name else 0 for name in personas]),
        captions=list(captions),
    )


def portrait_ratings(size: int, seed: int) -> Tensor:
    """True ratings (size,), 1 to 10, of the first portraits of the stream named by ``seed``."""
    scenes = (sample_scene(np.random.default_rng([seed, index])) for index in range(size))
    return torch.tensor([scene.rating for scene in scenes])


class IndexDataset(Dataset[Tensor]):
    """Batches of indices into ``PortraitArrays``: the training modules look up what they need."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, indices: list[int]) -> Tensor:
        return torch.tensor(indices)


def index_loader(size: int, batch_size: int) -> DataLoader[Tensor]:
    """A loader of random batches of indices below ``size``."""
    dataset = IndexDataset(size)
    sampler = BatchSampler(RandomSampler(dataset), batch_size, drop_last=True)
    return DataLoader(dataset, sampler=sampler, batch_size=None)


def main(size: int = 60000, seed: int = 0) -> None:
    """Render portraits.

    Args:
        size: number of portraits.
        seed: name of the stream.
    """
    portrait_arrays(size, seed)


if __name__ == "__main__":
    auto_cli(main)
