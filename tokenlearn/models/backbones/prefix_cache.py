"""What a UNet computes before its first cross-attention, once for all prompts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _State(threading.local):
    """Copies of the latents and cached outputs, for one thread: threads share the UNet."""

    copies = 1
    outputs: dict[nn.Module, Any] | None = None


class PrefixCache:
    """Lets the modules of a UNet before its first cross-attention see each of the latents once.

    Rows for several prompts at the same latents and timestep, as guidance needs them, differ from the first
    cross-attention on. Within :meth:`copies`, modules before it get the first copy of all rows alone, and their
    outputs are repeated. Within :meth:`cache`, they get no rows at all after the first evaluation, whose outputs
    are used again. The UNet computes the same. Only for UNets whose timestep embedding does not depend on the prompt.

    Args:
        unet: a diffusers UNet with cross-attention. It gets hooks.
    """

    def __init__(self, unet: Any) -> None:  # noqa: ANN401 - diffusers' models have no usable types
        self._state = _State()
        for module in _modules_before_the_prompt(unet):
            module.register_forward_pre_hook(self._take_first_copy, with_kwargs=True)
            module.register_forward_hook(self._repeat_output, with_kwargs=True)

    @contextmanager
    def copies(self, number: int) -> Iterator[None]:
        """While the UNet gets ``number`` copies of its latents one after another: a b a b for 2."""
        self._state.copies = number
        try:
            yield
        finally:
            self._state.copies = 1

    @contextmanager
    def cache(self) -> Iterator[None]:
        """While the UNet gets the same latents and timesteps again and again.

        Outputs that need a gradient with respect to the latents are computed each time. Within another call of this
        method, the outputs of the outer call are used.
        """
        if self._state.outputs is not None:
            yield
            return
        self._state.outputs = {}
        try:
            yield
        finally:
            self._state.outputs = None

    def _take_first_copy(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        inputs = (*args, *kwargs.values())
        differentiated = torch.is_grad_enabled() and any(rows.requires_grad for rows in inputs)
        outputs = self._state.outputs
        known = outputs is not None and module in outputs and not differentiated
        count = 0 if known else len(inputs[0]) // self._state.copies
        return tuple(rows[:count] for rows in args), {name: rows[:count] for name, rows in kwargs.items()}

    def _repeat_output(
        self,
        module: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor],
        output: Any,  # noqa: ANN401 - see _repeated
    ) -> Any:  # noqa: ANN401
        outputs = self._state.outputs
        if outputs is not None:
            if any(map(len, (*args, *kwargs.values()))):
                outputs[module] = output
            output = outputs[module]
        return output if self._state.copies == 1 else self._repeated(output)

    def _repeated(self, output: Any) -> Any:  # noqa: ANN401
        """Blocks give their output and a tuple of all their layers' outputs, other modules a tensor."""
        if isinstance(output, Tensor):
            return torch.cat([output] * self._state.copies)
        return tuple(map(self._repeated, output))


def _modules_before_the_prompt(unet: Any) -> list[nn.Module]:  # noqa: ANN401 - see PrefixCache
    """Modules before the first cross-attention, in their order."""
    modules: list[nn.Module] = [unet.conv_in]
    for block in unet.down_blocks:
        if getattr(block, "has_cross_attention", False):
            return [*modules, block.resnets[0]]
        modules.append(block)
    return modules
