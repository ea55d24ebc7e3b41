"""What a guidance rule is: one prediction out of several, for any sampler and any method."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from tokenlearn.diffusion.process import Process
from tokenlearn.errors import UserError

C = TypeVar("C")


class Predictor(Protocol):
    """A network at given conditionings, as a rule sees it; :class:`tokenlearn.guidance.GuidedModel` is one.

    Attributes:
        process: noise process of the network.
    """

    process: Process

    def predictions(
        self,
        latents: Tensor,
        timestep: Tensor,
        step: int,
        recompute: bool = False,
        known: Mapping[int, Tensor] | None = None,
    ) -> list[Tensor]:
        """Predictions (B, C, h, w) for the conditionings that the rule needs at a step."""

    def prediction(self, index: int, latents: Tensor, timestep: Tensor) -> Tensor:
        """Prediction (B, C, h, w) for the conditioning with an index."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), nominally in [0, 1], of clean latents (B, C, h, w)."""


class Level(NamedTuple):
    """A noise level ``z = alpha x0 + sigma e``."""

    alpha: float
    sigma: float


@dataclass(frozen=True, eq=False)
class Run:
    """A run of the sampler, for rules that look ahead.

    Attributes:
        alphas: (N + 1,) factor of the image at the noise level of each of N steps, and where the last step ends.
        sigmas: (N + 1,) factor of the noise.
        generators: one for each sample, on the CPU, which are advanced; None where the sampler has none.
    """

    alphas: Tensor
    sigmas: Tensor
    generators: Sequence[torch.Generator] | None = None

    @property
    def ratios(self) -> Tensor:
        """Noise ratios (N + 1,) ``sigma / alpha``."""
        return self.sigmas / self.alphas

    def level(self, step: int) -> Level:
        """Noise level that a step begins at; that of N is the end."""
        return Level(float(self.alphas[step]), float(self.sigmas[step]))

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal noise (B, C, h, w) of each sample's generator, which no other sample changes.

        Raises:
            ValueError: if there are no generators, or not as many as samples.
        """
        if self.generators is None or len(self.generators) != len(like):
            found = "no" if self.generators is None else len(self.generators)
            raise ValueError(f"the sampler has {found} generators for {len(like)} samples")
        drawn = [torch.randn(like.shape[1:], generator=generator) for generator in self.generators]
        return torch.stack(drawn).to(like)


class GuidanceRule(ABC):
    """A rule that combines the predictions for several prompts into one.

    A new rule overrides :meth:`__call__`. A rule with further prompts also overrides :attr:`concept_prompts`, and a
    rule that evaluates the network itself :meth:`guide`. Rules are settings: a state between steps belongs to the copy
    that :meth:`fresh` makes for one run of the sampler.

    Attributes:
        differentiable: whether the guided prediction has a gradient in the latents and the conditionings.
    """

    differentiable = True

    @property
    def concept_prompts(self) -> Sequence[str]:
        """Prompts that the rule evaluates besides the prompt and the negative prompt."""
        return ()

    @property
    def has_memory(self) -> bool:
        """Whether a step depends on the steps before it, as momentum does."""
        return False

    def conditionings(self, unconditional: C, prompt: C, *concepts: C) -> list[C]:
        """The conditionings that the network is evaluated for, in the order of the predictions.

        Args:
            unconditional: of the negative prompt, one row.
            prompt: of the prompt.
            concepts: of each of :attr:`concept_prompts`.
        """
        return [unconditional, prompt, *concepts]

    def needed(self, step: int) -> Sequence[int] | None:
        """Indices of :meth:`conditionings` that the rule needs at a step, at least one; None for all."""
        return None

    @abstractmethod
    def __call__(self, predictions: Sequence[Tensor], step: int) -> Tensor:
        """Guided prediction.

        Args:
            predictions: (B, C, h, w) for each conditioning that is :meth:`needed`.
            step: index of the sampling step.

        Returns:
            (B, C, h, w) guided prediction.
        """

    def guide(self, model: Predictor, latents: Tensor, timestep: Tensor, step: int, recompute: bool = False) -> Tensor:
        """Guided prediction (B, C, h, w) at latents (B, C, h, w), with the network at hand.

        Args:
            model: the network.
            latents: (B, C, h, w).
            timestep: () or (B,) noise level of the latents.
            step: index of the sampling step.
            recompute: whether activations are computed again in the backward pass.
        """
        return self(model.predictions(latents, timestep, step, recompute), step)

    def begin(self, run: Run) -> None:  # noqa: B027 - most rules look at one step at a time
        """Take note of the run that follows; samplers with schedulers call it before their first step.

        Args:
            run: noise levels and generators of the run.
        """

    def fresh(self) -> Self:
        """A copy of the rule for one run of the sampler, which shares the settings and no state."""
        return copy.copy(self)

    def check_steps(self, steps: int) -> None:  # noqa: B027 - most rules act at any number of steps
        """Refuse a number of sampling steps at which the rule would never act.

        Raises:
            UserError: naming the setting.
        """


def require_differentiable(rule: GuidanceRule, setting: str) -> None:
    """Refuse a rule without a gradient.

    Args:
        rule: guidance rule.
        setting: name of its setting.

    Raises:
        UserError: naming the setting and the rule.
    """
    if not rule.differentiable:
        raise UserError(
            f"{setting} {type(rule).__name__} has no gradient; set {setting} to another rule, or to a number"
        )
