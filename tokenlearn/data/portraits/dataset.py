"""The portraits world as a Hugging Face dataset or a folder of PNG files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenlearn.data.portraits.captions import caption
from tokenlearn.data.portraits.drawing import draw
from tokenlearn.data.portraits.scene import (
    ATTRIBUTES,
    ORDINARY,
    PERSONAS,
    STYLES,
    Scene,
    sample_scene,
    with_attribute,
)
from tokenlearn.files import atomic_write

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]

PERSONA_LABELS = (ORDINARY, *PERSONAS)
"""Class names of the column ``persona``."""


def portrait_features() -> datasets.Features:
    """Columns of :func:`portraits_dataset` and their types."""
    import datasets

    return datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            "attributes": datasets.Sequence(datasets.Value("bool"), length=len(ATTRIBUTES)),
            "persona": datasets.ClassLabel(names=list(PERSONA_LABELS)),
            "parts": datasets.Value("int32"),
            "style": datasets.ClassLabel(names=list(STYLES)),
            "pipe": datasets.Value("bool"),
            "hair_color": datasets.Value("string"),
            "rating": datasets.Value("float32"),
        }
    )


def portrait(seed: int, index: int, **scene_options: Any) -> tuple[Scene, Image.Image, str]:  # noqa: ANN401
    """The scene, image (64 x 64 RGB) and caption at one position of the endless stream that ``seed`` names.

    ``scene_options`` are those of :func:`tokenlearn.data.portraits.scene.sample_scene`, such as a ``persona``.
    """
    rng = np.random.default_rng([seed, index])
    scene = sample_scene(rng, **scene_options)
    return scene, draw(scene), caption(scene, rng)


def portrait_of_persona(seed: int, index: int) -> tuple[Scene, Image.Image, str]:
    """The same of a stream in which every portrait shows a persona, each in its turn."""
    return portrait(seed, index, persona=list(PERSONAS)[index % len(PERSONAS)])


def attribute_mask(scene: Scene, attribute: str) -> NDArray[np.bool_]:
    """The pixels (64, 64) that an attribute decides: those in which the scene with it and without it differ."""
    absent, present = (np.asarray(draw(with_attribute(scene, attribute, shown))) for shown in (False, True))
    differs: NDArray[np.bool_] = (absent != present).any(axis=-1)
    return differs


def portrait_captions(seed: int, index: int, count: int) -> list[str]:
    """``count`` captions of a portrait; the first is the caption of :func:`portrait`."""
    rng = np.random.default_rng([seed, index])
    scene = sample_scene(rng)
    return [caption(scene, rng) for _ in range(count)]


def _row(scene: Scene, image: Image.Image, text: str) -> dict[str, Any]:
    return {
        "image": image,
        "caption": text,
        "attributes": [scene.has(name) for name in ATTRIBUTES],
        "persona": scene.persona or ORDINARY,
        "parts": len(scene.parts),
        "style": scene.style,
        "pipe": scene.pipe,
        "hair_color": "gray" if scene.has("gray hair") else scene.hair_color,
        "rating": float(np.float32(scene.rating)),  # as the column stores it, so that streamed rows equal cached ones
    }


def _rows(seed: int, shards: list[range], personas: bool) -> Iterator[dict[str, Any]]:
    drawn = portrait_of_persona if personas else portrait
    for shard in shards:
        for index in shard:
            yield _row(*drawn(seed, index))


def portraits_dataset(
    size: int, seed: int = 0, *, streaming: bool = False, num_shards: int = 1, personas: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """Portraits as a Hugging Face dataset with the columns of :func:`portrait_features`.

    Args:
        size: number of portraits.
        seed: name of the stream; the same seed gives the same pixels and captions.
        streaming: draw the portraits while iterating instead of writing a cache.
        num_shards: parts of the streamed dataset that workers or ranks may take.
        personas: whether every portrait shows a persona, each in its turn; else few do.
    """
    import datasets

    bounds = np.linspace(0, size, num_shards + 1).astype(int)
    shards = [range(int(start), int(stop)) for start, stop in pairwise(bounds)]
    arguments = {"seed": seed, "shards": shards, "personas": personas}
    if streaming:
        return datasets.IterableDataset.from_generator(_rows, features=portrait_features(), gen_kwargs=arguments)
    return datasets.Dataset.from_generator(_rows, features=portrait_features(), gen_kwargs=arguments)


def export_folder(folder: str | os.PathLike[str], size: int, seed: int = 0) -> Path:
    """Write portraits as PNG files with a ``metadata.jsonl`` that the ``imagefolder`` loader of ``datasets`` reads.

    Existing images are not written again, so an interrupted export resumes where it stopped.
    """
    target = Path(folder)
    lines = []
    for index in range(size):
        name = f"{index:06d}.png"
        scene, image, text = portrait(seed, index)
        if not (target / name).exists():
            with atomic_write(target / name) as temporary:
                image.save(temporary, format="PNG")
        row = {key: value for key, value in _row(scene, image, text).items() if key != "image"}
        lines.append(json.dumps({"file_name": name, **row}))
    with atomic_write(target / "metadata.jsonl") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    return target
