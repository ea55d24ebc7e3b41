"""Frozen modules: used, never trained."""

from __future__ import annotations

from typing import Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from tokenlearn.errors import UserError

Precision = Literal["float32", "bfloat16", "float16"]

M = TypeVar("M", bound=nn.Module)


def freeze(module: M) -> M:
    """Put a module into eval mode and stop gradients to its parameters. Gradients still flow to its inputs.

    Both are needed: in training mode, BatchNorm statistics change even if no parameter does.
    """
    module.eval()
    return module.requires_grad_(False)


class FrozenModule(nn.Module):
    """A module that stays in eval mode when a training loop switches its parent to training."""

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode whatever ``mode`` says."""
        return super().train(False)


def require_finite(outputs: Tensor, images: Tensor, model: str) -> Tensor:
    """What a network says of images, if it is finite; where there is a gradient, the loss is checked instead.

    Comparisons with NaN are false and its largest element is the first, so a score would look like a measurement.

    Args:
        outputs: outputs of the network.
        images: (B, 3, H, W) that the network was given.
        model: name or folder of the network.

    Returns:
        ``outputs``.

    Raises:
        UserError: saying whether the images or the network are the cause.
    """
    if torch.is_grad_enabled() or outputs.isfinite().all():
        return outputs
    if not images.isfinite().all():
        raise UserError(
            f"the images that '{model}' was given are not finite; lower the guidance scale or the learning rate, or "
            "use float32 or bfloat16"
        )
    raise UserError(
        f"'{model}' gives values that are not finite for finite images; its files are damaged, or its precision is "
        "too low: give another model"
    )
