"""What CASO chooses for an image at random: the attribute and class to edit it to, the timestep, and the noise.

Everything depends on a seed and on the position of the image in the training alone, not on the number of processes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import starmap
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenlearn.data.labels import UNKNOWN
from tokenlearn.models.attributes import Attribute, check_class_range

Targets = Literal["any", "missing"]
"""Choices of the class that an image is edited to."""


class EditTargets(NamedTuple):
    """What is chosen for B images.

    Attributes:
        attributes: B indices of the attributes to edit.
        classes: (B,) class to edit the attribute to, int64.
        present: (B,) bool, whether the image shows the class already.
        timesteps: (B,) noise levels.
        noise: (B, C, h, w) standard normal noise.
    """

    attributes: list[int]
    classes: Tensor
    present: Tensor
    timesteps: Tensor
    noise: Tensor


@torch.no_grad()
def present_classes(
    labels: Mapping[str, Tensor], attributes: Sequence[Attribute], like: Tensor, logits: Callable[[], Tensor] | None
) -> Tensor:
    """Classes that images show.

    Args:
        labels: attribute name to class (B,) by the data, -1 where it is not known.
        attributes: A attributes.
        like: tensor of B rows on the device of the labels.
        logits: evaluates the classifier's logits (B, num_outputs), which decide where a label is not known; None to
            leave it unknown.

    Returns:
        (B, A) class of each attribute, -1 where it is not known.

    Raises:
        UserError: if the data have a class that an attribute does not have.
    """
    unknown = torch.full((len(like),), UNKNOWN, device=like.device)
    present = torch.stack([labels.get(attribute.name, unknown) for attribute in attributes], dim=1)
    check_class_range(present, attributes)
    if logits is None or not (present == UNKNOWN).any():
        return present
    outputs = logits()
    predicted = torch.stack([attribute.class_index(outputs) for attribute in attributes], dim=1)
    return torch.where(present == UNKNOWN, predicted, present)


def choose_targets(
    positions: Sequence[int],
    present: Tensor,
    *,
    num_classes: Sequence[int],
    class_counts: Sequence[Tensor | None],
    targets: Targets,
    timesteps: Sequence[int],
    shape: Sequence[int],
    seed: int,
) -> EditTargets:
    """Choose how images are edited.

    Args:
        positions: position of each of B images in the training.
        present: (B, A) class of each attribute that an image shows, -1 where it is not known.
        num_classes: number of classes of each of A attributes.
        class_counts: (K,) number of images of each class of each attribute, None where they are not known.
        targets: ``any`` chooses each attribute and each of its classes with the same probability. ``missing`` chooses
            a class that the image does not show, of an attribute with a probability in proportion to the
            :func:`rarity` of the class that it shows: a rare class is removed as often as a common one.
        timesteps: timesteps to choose from, each with the same probability.
        shape: shape (C, h, w) of the noise of one image.
        seed: seed of the training.

    Returns:
        The choices, on the device of ``present``. The choice for an image depends on its position, on the classes that
        it shows and on the settings.
    """
    attributes, classes, levels, noise = [], [], [], []
    for position, labels in zip(positions, present.tolist(), strict=True):
        rng = np.random.default_rng([seed, position])
        if targets == "missing":
            weights = np.array(list(starmap(rarity, zip(class_counts, labels, strict=True))))
            attribute = int(rng.choice(len(labels), p=weights / weights.sum()))
            missing = [k for k in range(num_classes[attribute]) if k != labels[attribute]]
            classes.append(missing[int(rng.integers(len(missing)))])
        else:
            attribute = int(rng.integers(len(num_classes)))
            classes.append(int(rng.integers(num_classes[attribute])))
        attributes.append(attribute)
        levels.append(timesteps[int(rng.integers(len(timesteps)))])
        noise.append(_noise(rng, shape))
    device = present.device
    chosen = torch.tensor(classes, device=device)
    before = present[torch.arange(len(attributes), device=device), torch.tensor(attributes, device=device)]
    return EditTargets(
        attributes, chosen, before == chosen, torch.tensor(levels, device=device), torch.stack(noise).to(device)
    )


def rarity(counts: Tensor | None, label: int) -> float:
    """Number of images per class over the number of images of a class, ``N / (K N_k)``.

    Args:
        counts: (K,) number of images of each class; None if they are not known.
        label: the class, -1 if it is not known.

    Returns:
        Above 1 for rare classes, below 1 for common ones; 1 if counts or class are not known.
    """
    if counts is None or label == UNKNOWN:
        return 1.0
    return float(counts.sum() / (len(counts) * counts[label].clamp(min=1)))


def named_noise(names: Sequence[str], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (B, C, h, w) that the names of B images seed, the same in every validation.

    Args:
        names: names of the images.
        shape: shape (C, h, w) of the noise of one image.
    """
    return torch.stack([_noise(np.random.default_rng(zlib.crc32(name.encode())), shape) for name in names])


def _noise(rng: np.random.Generator, shape: Sequence[int]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))
