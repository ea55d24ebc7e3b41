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
    outputs are repeated; inside of :meth:`kept`, they get no rows at all after the first evaluation, whose outputs
    are given again. The UNet does not notice. Only for UNets whose timestep embedding has no part of the prompt.

    Args:
        unet: a diffusers UNet with cross-attention. It gets hooks.
    """

    def __init__(self, unet: Any) -> None:  # noqa: ANN401 - diffusers' models have no usable types
        self._copies = 1
        self._kept: dict[nn.Module, Any] | None = None
        for module in _modules_before_the_prompt(unet):
            module.register_forward_pre_hook(self._take_first_copy, with_kwargs=True)
            module.register_forward_hook(self._repeat_output, with_kwargs=True)

    @contextmanager
    def copies(self, number: int) -> Iterator[None]:
        """While the UNet gets ``number`` copies of its latents one after another: a b a b for 2."""
        self._copies = number
        try:
            yield
        finally:
            self._copies = 1

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While the UNet gets the same latents and timesteps again and again.

        What needs a gradient with respect to the latents is computed each time.
        """
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def _take_first_copy(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        inputs = (*args, *kwargs.values())
        differentiated = torch.is_grad_enabled() and any(rows.requires_grad for rows in inputs)
        known = self._kept is not None and module in self._kept and not differentiated
        count = 0 if known else len(inputs[0]) // self._copies
        return tuple(rows[:count] for rows in args), {name: rows[:count] for name, rows in kwargs.items()}

    def _repeat_output(
        self,
        module: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor],
        output: Any,  # noqa: ANN401 - see _repeated
    ) -> Any:  # noqa: ANN401
        if self._kept is not None:
            if any(map(len, (*args, *kwargs.values()))):
                self._kept[module] = output
            output = self._kept[module]
        return output if self._copies == 1 else self._repeated(output)

    def _repeated(self, output: Any) -> Any:  # noqa: ANN401
        """Blocks give their output and a tuple of all their layers' outputs, other modules a tensor."""
        if isinstance(output, Tensor):
            return torch.cat([output] * self._copies)
        return tuple(map(self._repeated, output))


def _modules_before_the_prompt(unet: Any) -> list[nn.Module]:  # noqa: ANN401 - see SharedPrefix
    """Modules that take latents, in their order."""
    modules: list[nn.Module] = [unet.conv_in]
    for block in unet.down_blocks:
        if getattr(block, "has_cross_attention", False):
            return [*modules, block.resnets[0]]
        modules.append(block)
    return modules
