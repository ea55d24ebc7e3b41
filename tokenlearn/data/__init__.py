"""What methods learn from: streams of prompts and seeds, images, and the bundled world."""

from tokenlearn.data.generated import GeneratedDataModule
from tokenlearn.data.images import ImageBatch, ImageDataModule
from tokenlearn.data.latent_cache import LatentCache
from tokenlearn.data.prompts import PromptBatch, PromptDataModule, PromptList, PromptStream

__all__ = [
    "GeneratedDataModule",
    "ImageBatch",
    "ImageDataModule",
    "LatentCache",
    "PromptBatch",
    "PromptDataModule",
    "PromptList",
    "PromptStream",
]
