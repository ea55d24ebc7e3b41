"""Frozen modules: used, never trained."""

from __future__ import annotations

from typing import Literal, Self, TypeVar

from torch import nn

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
