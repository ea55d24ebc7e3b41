"""Data to learn from: streams of prompts and seeds, images, and the bundled world."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenlearn.data.batches import ImageBatch, PromptBatch

if TYPE_CHECKING:
    from tokenlearn.data.generated import GeneratedDataModule
    from tokenlearn.data.image_datamodule import ImageDataModule
    from tokenlearn.data.image_samples import ImageReading
    from tokenlearn.data.images_to_edit import EditableImage, FolderImages, GeneratedImages
    from tokenlearn.data.labels import LabelColumns
    from tokenlearn.data.latent_cache import LatentCache, LatentCaching
    from tokenlearn.data.prompts import PromptDataModule, PromptList
    from tokenlearn.data.rows import HeldOut

__all__ = [
    "EditableImage",
    "FolderImages",
    "GeneratedDataModule",
    "GeneratedImages",
    "HeldOut",
    "ImageBatch",
    "ImageDataModule",
    "ImageReading",
    "LabelColumns",
    "LatentCache",
    "LatentCaching",
    "PromptBatch",
    "PromptDataModule",
    "PromptList",
]

# Imported when they are first used: data modules need Lightning, which the pipeline does not.
_MODULES = {
    "EditableImage": "images_to_edit",
    "FolderImages": "images_to_edit",
    "GeneratedDataModule": "generated",
    "GeneratedImages": "images_to_edit",
    "HeldOut": "rows",
    "ImageDataModule": "image_datamodule",
    "ImageReading": "image_samples",
    "LabelColumns": "labels",
    "LatentCache": "latent_cache",
    "LatentCaching": "latent_cache",
    "PromptDataModule": "prompts",
    "PromptList": "prompts",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - classes of several kinds
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
