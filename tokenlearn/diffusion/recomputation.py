"""Recomputation: activations are computed again in the backward pass instead of being stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


def recomputed(function: Callable[..., tuple[Tensor, ...]], *items: Any) -> tuple[Tensor, ...]:  # noqa: ANN401 - any of what tensors_of finds
    """Outputs of a function whose activations are computed again for the gradient.

    Like ``torch.utils.checkpoint`` it stores the inputs alone. Unlike it, it records no graph in the forward pass, and
    works with ``torch.autograd.grad``.

    Args:
        function: a deterministic function. Tensors that it closes over get no gradient.
        items: its arguments: tensors, dataclasses of tensors, sequences and mappings of these, or anything without
            tensors.
    """
    return cast(tuple[Tensor, ...], _Recomputed.apply(function, items, *tensors_of(items)))


def autocast_settings(device_type: str) -> dict[str, Any]:
    """The autocast in effect, as arguments of ``torch.autocast``.

    A backward pass must compute in the same precision, and autograd does not restore autocast.
    """
    return {
        "device_type": device_type,
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
    }


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's own contexts have no public type
        function: Callable[..., tuple[Tensor, ...]],
        items: tuple[Any, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.function, ctx.items = function, items
        ctx.autocast = autocast_settings(tensors[0].device.type)
        ctx.save_for_backward(*tensors)
        return function(*items)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - see forward
        needed = ctx.needs_input_grad[2:]
        tensors = leaves_of(ctx.saved_tensors, needed)
        leaves = [tensor for tensor in tensors if tensor.requires_grad]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            outputs = ctx.function(*with_tensors(ctx.items, tensors))
        # Conditioning that the network does not use gets zeros.
        remaining = iter(torch.autograd.grad(outputs, leaves, gradients, materialize_grads=True))
        return None, None, *(next(remaining) if need else None for need in needed)


def leaves_of(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    """The same values as leaves of a new graph, of which those that are needed require a gradient."""
    return [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]


def tensors_of(items: Sequence[Any]) -> list[Tensor]:
    """All tensors in items, in the order that :func:`with_tensors` takes them."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    for item in items:
        _map(item, note)
    return found


def with_tensors(items: Sequence[T], tensors: Sequence[Tensor]) -> list[T]:
    """The items with other tensors in place of theirs."""
    remaining = iter(tensors)
    return [_map(item, lambda _: next(remaining)) for item in items]


def _map(item: T, function: Callable[[Tensor], Tensor]) -> T:
    """A dataclass with each tensor in it, and in mappings and sequences in it, replaced."""
    if isinstance(item, Tensor):
        return cast(T, function(item))
    if isinstance(item, Mapping):
        return cast(T, {key: _map(value, function) for key, value in item.items()})
    if isinstance(item, (list, tuple)):
        return cast(T, type(item)(_map(value, function) for value in item))
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        values = {field.name: _map(getattr(item, field.name), function) for field in dataclasses.fields(item)}
        return dataclasses.replace(item, **values)
    return item
