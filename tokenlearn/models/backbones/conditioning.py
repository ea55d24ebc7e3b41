"""Conditionings: encoded prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Inputs of a network besides latents and timestep, one row per sample.

    Attributes:
        prompt_embeds: (B, L, D) text encoder states.
        pooled_prompt_embeds: (B, P) state at the end of the text, for networks that use one.
        extra: further (B, ...) inputs by the network's own names, such as SDXL's ``time_ids``.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def requires_grad(self) -> bool:
        """Whether any tensor in it requires a gradient."""
        return any(tensor.requires_grad for tensor in self._tensors())

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.prompt_embeds)

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        """Rows chosen by a slice or a (n,) tensor of indices."""
        return self._map(lambda tensor: tensor[rows])

    def expand(self, batch: int) -> Conditioning:
        """One row as ``batch`` rows that share its memory.

        Raises:
            ValueError: if there is more than one row, and not ``batch``.
        """
        if len(self) not in (1, batch):
            raise ValueError(f"cannot expand {len(self)} rows to {batch}")
        return self._map(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    @staticmethod
    def cat(conditionings: Sequence[Conditioning]) -> Conditioning:
        """Rows of all conditionings, one after another; all must have the same parts."""
        first = conditionings[0]
        pooled = [item.pooled_prompt_embeds for item in conditionings if item.pooled_prompt_embeds is not None]
        if len(pooled) not in (0, len(conditionings)) or any(
            set(item.extra) != set(first.extra) for item in conditionings
        ):
            raise ValueError("conditionings with different parts cannot be put together")
        return Conditioning(
            torch.cat([item.prompt_embeds for item in conditionings]),
            torch.cat(pooled) if pooled else None,
            {name: torch.cat([item.extra[name] for item in conditionings]) for name in first.extra},
        )

    def equals(self, other: Conditioning) -> bool:
        """Whether another conditioning has the same parts with the same values."""
        mine, others = self._tensors(), other._tensors()
        return len(mine) == len(others) and all(map(torch.equal, mine, others))

    def _tensors(self) -> list[Tensor]:
        pooled = [] if self.pooled_prompt_embeds is None else [self.pooled_prompt_embeds]
        return [self.prompt_embeds, *pooled, *self.extra.values()]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(
            function(self.prompt_embeds),
            None if self.pooled_prompt_embeds is None else function(self.pooled_prompt_embeds),
            {name: function(tensor) for name, tensor in self.extra.items()},
        )
