"""Small sources of items, and tasks that implement the interfaces of data and nothing else."""

from types import SimpleNamespace

import datasets
import torch
from lightning.pytorch.plugins.precision import Precision
from torch.nn import functional

from tokenlearn.data.interfaces import ClassConsumer, ImageConsumer
from tokenlearn.data.sources import CountingSource, ShuffledSource, StreamedSource

ROWS = 23


def open_stream():
    return datasets.Dataset.from_dict({"n": range(ROWS)}).to_iterable_dataset(num_shards=3)


def number(item):
    value = item.index if item.row is None else item.row["n"]
    assert item.row is None or item.index == value
    return value


SOURCES = {
    "counting": CountingSource,
    "shuffled": lambda: ShuffledSource(ROWS, seed=3),
    "streamed": lambda: StreamedSource(open_stream, seed=3, block_size=5),
}


class ImageTask(ImageConsumer):
    """Latents are images of half the size with the sum of colours as the fourth channel."""

    image_size = 16
    size_multiple = 2

    def __init__(self, size_multiple=2, weights=1.0, learned_placeholders=(), **sampling):
        self.size_multiple, self.weights, self.sampling = size_multiple, weights, sampling
        self._learned_placeholders = learned_placeholders

    @property
    def learned_placeholders(self):
        return self._learned_placeholders

    def encode_images(self, images):
        small = functional.avg_pool2d(images, 2) * self.weights
        return torch.cat([small, small.sum(dim=1, keepdim=True)], dim=1)

    def generate_latents(self, prompts, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])
        return noise + torch.tensor([float(len(prompt)) for prompt in prompts])[:, None, None, None]

    def encoder_key(self):
        return {"weights": self.weights}

    def sampling_key(self):
        return {"weights": self.weights, **self.sampling}


class ClassTask(ClassConsumer):
    """A task with classes."""

    def __init__(self, class_descriptions):
        self._class_descriptions = class_descriptions

    @property
    def class_descriptions(self):
        return self._class_descriptions


def trainer_with(task, rank=0, world_size=1, precision="32-true"):
    """What data modules use of a trainer."""
    return SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        lightning_module=task,
        precision=precision,
        precision_plugin=Precision(),
        strategy=SimpleNamespace(barrier=lambda name: None),
    )
