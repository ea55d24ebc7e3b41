"""What a UNet computes before it looks at the prompt, once for all prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class SharedPrefix:
    """Lets the modules of a UNet before its first cross-attention see each of the latents once.

    Rows for several prompts at the same latents and timestep, as guidance needs them, differ from the first
    cross-attention on. Inside of :meth:`copies`, modules before it get the first copy of all rows alone, and their
    outputs are repeated, so the UNet does not notice. Only for UNets whose timestep embedding has no part of the
    prompt.

    Args:
        unet: a diffusers UNet with cross-attention. It gets hooks.
    """

    def __init__(self, unet: Any) -> None:  # noqa: ANN401 - diffusers' models have no usable types
        self._copies = 1
        for module in _modules_before_the_prompt(unet):
            module.register_forward_pre_hook(self._take_first_copy, with_kwargs=True)
            module.register_forward_hook(self._repeat_output)

    @contextmanager
    def copies(self, number: int) -> Iterator[None]:
        """While the UNet gets ``number`` copies of its latents one after another: a b a b for 2."""
        self._copies = number
        try:
            yield
        finally:
            self._copies = 1

    def _take_first_copy(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        return tuple(map(self._first_copy, args)), {name: self._first_copy(value) for name, value in kwargs.items()}

    def _first_copy(self, rows: Tensor) -> Tensor:
        return rows[: len(rows) // self._copies]

    def _repeat_output(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:  # noqa: ANN401
        """Blocks give their output and a tuple of all their layers' outputs, other modules a tensor."""
        if self._copies == 1:
            return output
        if isinstance(output, Tensor):
            return torch.cat([output] * self._copies)
        return tuple(self._repeat_output(module, args, part) for part in output)


def _modules_before_the_prompt(unet: Any) -> list[nn.Module]:  # noqa: ANN401 - see SharedPrefix
    """Modules that take latents, in their order."""
    modules: list[nn.Module] = [unet.conv_in]
    for block in unet.down_blocks:
        if getattr(block, "has_cross_attention", False):
            return [*modules, block.resnets[0]]
        modules.append(block)
    return modules
