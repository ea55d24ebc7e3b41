"""A diffusion model in which guidance has already happened."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from tokenlearn.diffusion.process import Process
from tokenlearn.diffusion.recomputation import recomputed
from tokenlearn.guidance.base import GuidanceRule, Run


class ConditioningRows(Protocol):
    """A conditioning as guidance sees it: a batch of rows that can be stacked."""

    @property
    def requires_grad(self) -> bool:
        """Whether any tensor in it needs a gradient."""

    def __len__(self) -> int:
        """Number of rows."""

    def expand(self, batch: int) -> Self:
        """One row repeated to ``batch`` rows."""

    def equals(self, other: Any) -> bool:  # noqa: ANN401 - of the same kind
        """Whether another conditioning has the same values."""

    @staticmethod
    def cat(conditionings: Sequence[Any]) -> Any:  # noqa: ANN401 - static methods cannot name Self
        """Rows of all conditionings, one after another."""


C = TypeVar("C", bound=ConditioningRows)
Rows = TypeVar("Rows", bound=ConditioningRows, contravariant=True)


class Network(Protocol[Rows]):
    """A frozen network, as adapters implement it, see :class:`tokenlearn.models.DiffusionBackbone`."""

    @property
    def process(self) -> Process:
        """Noise process, which says the kind of prediction."""

    def __call__(self, latents: Tensor, timesteps: Tensor, conditioning: Rows) -> Tensor:
        """Predictions (rows, C, h, w) for conditioning rows."""


class GuidedModel(Generic[C]):
    """One prediction for latents at a timestep, by a network and a guidance rule.

    Samplers, inversion and solvers take this and know nothing of guidance. Conditionings that require no gradient (the
    empty prompt's) go through the network apart from the others, without a graph, unless the latents require one.
    Otherwise all conditionings share one call of the network.

    Args:
        backbone: frozen network.
        rule: guidance rule. The model works on a fresh copy of it, so one rule serves any number of models.
        conditionings: of each prompt that the rule needs, in its order, of one row or of as many as the latents.

    Attributes:
        backbone, conditionings: as given.
        rule: the copy, which holds the state of the last run, such as :attr:`SemanticGuidance.recorded`.
        process: noise process of the network.
        shares_latents: whether a network that can take the latents once for several conditionings does so.
    """

    shares_latents = True

    def __init__(self, backbone: Network[C], rule: GuidanceRule, conditionings: Sequence[C]) -> None:
        self.backbone, self.conditionings = backbone, conditionings
        self.rule = rule.fresh()
        self.process = backbone.process

    @property
    def has_memory(self) -> bool:
        """Whether a step depends on the steps before it."""
        return self.rule.has_memory

    def with_conditionings(self, conditionings: Sequence[C]) -> Self:
        """The same model, with the same state of the rule, for other conditionings."""
        other = copy.copy(self)
        other.conditionings = conditionings
        return other

    def begin(
        self, timesteps: Tensor, end: Tensor | None = None, generators: Sequence[torch.Generator] | None = None
    ) -> None:
        """Tell the rule the run that follows.

        Args:
            timesteps: (N,) of the steps.
            end: () noise level at which the last step ends; None for clean latents.
            generators: one for each sample.
        """
        alphas, sigmas = self.process.alpha(timesteps).cpu(), self.process.sigma(timesteps).cpu()
        last = (torch.ones(()), torch.zeros(())) if end is None else (self.process.alpha(end), self.process.sigma(end))
        alphas, sigmas = (
            torch.cat([levels, level.cpu().reshape(1)]) for levels, level in zip((alphas, sigmas), last, strict=True)
        )
        self.rule.begin(Run(alphas, sigmas, generators))

    def __call__(self, latents: Tensor, timestep: Tensor, step: int, recompute: bool = False) -> Tensor:
        """Guided prediction (B, C, h, w) of the process's kind.

        Args:
            latents: (B, C, h, w).
            timestep: () or (B,) noise level of the latents.
            step: index of the sampling step, for the rule.
            recompute: whether activations are computed again in the backward pass.
        """
        return self.rule.guide(self, latents, timestep, step, recompute)

    def noise(self, latents: Tensor, timestep: Tensor, step: int = 0) -> Tensor:
        """Guided noise prediction (B, C, h, w) for reversible solvers; arguments as in :meth:`__call__`."""
        apart = copy.copy(self)
        # Sharing is a matter of the last digits, which a solver that is followed back amplifies: one way for all.
        apart.shares_latents = False
        return self.process.noise(latents, apart(latents, timestep, step), timestep)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), nominally in [0, 1], of clean latents (B, C, h, w)."""
        decode: Any = getattr(self.backbone, "decode_latents")  # noqa: B009 - networks of tests have no decoder
        images: Tensor = decode(latents)
        return images

    def prediction(self, index: int, latents: Tensor, timestep: Tensor) -> Tensor:
        """Unguided prediction (B, C, h, w) for the conditioning with an index."""
        return self.backbone(latents, timestep, self.conditionings[index].expand(len(latents)))

    def needed(self, step: int) -> Sequence[int]:
        """Indices of the conditionings that the rule needs at a step."""
        needed = self.rule.needed(step)
        return range(len(self.conditionings)) if needed is None else needed

    def predictions(
        self,
        latents: Tensor,
        timestep: Tensor,
        step: int,
        recompute: bool = False,
        known: Mapping[int, Tensor] | None = None,
    ) -> list[Tensor]:
        """Predictions (B, C, h, w) for the conditionings that the rule needs at a step, unguided.

        Args:
            latents: (B, C, h, w).
            timestep: () or (B,).
            step: index of the sampling step.
            recompute: whether activations are computed again in the backward pass.
            known: predictions that are there already, by the index of their conditioning.
        """
        batch = len(latents)
        indices = self.needed(step)
        outputs = {index: prediction for index, prediction in (known or {}).items() if index in indices}
        rows = {
            index: item if len(item := self.conditionings[index]) == batch else item.expand(batch)
            for index in indices
            if index not in outputs
        }
        differentiated = {
            index: torch.is_grad_enabled() and (latents.requires_grad or item.requires_grad)
            for index, item in rows.items()
        }
        # The backward pass would recompute after the context has ended.
        context = nullcontext() if recompute else _same_latents(self.backbone)
        with context:
            for with_grad in sorted(set(differentiated.values())):
                members = [index for index, needs in differentiated.items() if needs == with_grad]
                evaluate = partial(evaluate_together, self.backbone, shared=self.shares_latents)
                conditionings = [rows[index] for index in members]
                if with_grad and recompute:
                    found = recomputed(evaluate, latents, timestep, conditionings)
                else:
                    with torch.set_grad_enabled(with_grad):
                        found = evaluate(latents, timestep, conditionings)
                outputs |= zip(members, found, strict=True)
        return [outputs[index] for index in indices]


def _same_latents(backbone: object) -> AbstractContextManager[None]:
    context: AbstractContextManager[None] = getattr(backbone, "same_latents", nullcontext)()
    return context


def evaluate_together(
    network: Network[C], latents: Tensor, timestep: Tensor, conditionings: Sequence[C], shared: bool = True
) -> tuple[Tensor, ...]:
    """Predictions of a network for several conditionings of the same latents, in one call.

    Args:
        network: a network.
        latents: (B, C, h, w).
        timestep: () or (B,).
        conditionings: each of B rows.
        shared: whether a network with a true attribute ``takes_shared_latents`` gets the latents once.

    Returns:
        A prediction (B, C, h, w) for each conditioning.
    """
    copies = len(conditionings)
    if not (shared and getattr(network, "takes_shared_latents", False)):
        latents = torch.cat([latents] * copies)
        timestep = timestep if timestep.ndim == 0 else timestep.repeat(copies)
    return network(latents, timestep, conditionings[0].cat(conditionings)).chunk(copies)
