"""How a gradient goes back through sampling, apart from the solver that samples.

A sampler asks a :class:`Gradient` how many of its last steps are differentiated, whether activations are recomputed in
the backward pass, and whether the network's inputs are constants. ``None`` in place of a gradient means none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenlearn.errors import UserError


class Gradient(ABC):
    """A way to differentiate the sampler."""

    checkpointing: bool
    """Whether activations are recomputed in the backward pass."""
    detach_inputs: bool = False
    """Whether the network's inputs are constants at every step."""
    needs_reversible_solver: bool = False
    """Whether the solver must be exactly invertible."""

    @abstractmethod
    def num_steps(self, total: int) -> int:
        """Number of differentiated steps, counted from the last, of a sampler with ``total`` steps."""


def _check_steps(name: str, steps: int | None) -> None:
    if steps is not None and steps < 1:
        raise UserError(f"steps of {name} must be at least 1, got {steps}")


@dataclass(frozen=True)
class LastK(Gradient):
    """The gradient through the last K steps; latents before them are constants.

    One step is the gradient of discriminative class tokens as published (https://arxiv.org/abs/2303.17155).

    Args:
        steps: K; more than the sampler has is all of them.
        checkpointing: recompute the activations of each step in the backward pass: the memory of one step, not of K.

    Raises:
        UserError: if ``steps`` is below 1.
    """

    steps: int = 8
    checkpointing: bool = True

    def __post_init__(self) -> None:
        _check_steps("LastK", self.steps)

    def num_steps(self, total: int) -> int:
        """See :class:`Gradient`."""
        return min(self.steps, total)


@dataclass(frozen=True)
class Detached(Gradient):
    """The gradient of each step's output for its prompt, but not through the steps before it (DRTune).

    It is biased, costs about half, and stays bounded where the gradient through all steps explodes
    (https://arxiv.org/abs/2405.00760).

    Args:
        steps: number of differentiated steps, counted from the last; null for all.
        checkpointing: recompute the activations of each step in the backward pass.

    Raises:
        UserError: if ``steps`` is below 1.
    """

    steps: int | None = None
    checkpointing: bool = True
    detach_inputs = True

    def __post_init__(self) -> None:
        _check_steps("Detached", self.steps)

    def num_steps(self, total: int) -> int:
        """See :class:`Gradient`."""
        return total if self.steps is None else min(self.steps, total)


@dataclass(frozen=True)
class Checkpointed(Gradient):
    """The exact gradient through all steps, each of which is evaluated again in the backward pass.

    Memory is that of one step, and of the latents between steps. Its time is about half of EDICT's
    (``benchmarks/full_chain.py``).
    """

    checkpointing = True

    def num_steps(self, total: int) -> int:
        """See :class:`Gradient`."""
        return total


@dataclass(frozen=True)
class Stored(Gradient):
    """The exact gradient through all steps with every activation in memory."""

    checkpointing = False

    def num_steps(self, total: int) -> int:
        """See :class:`Gradient`."""
        return total


@dataclass(frozen=True)
class Reversible(Gradient):
    """The gradient through all steps in memory that does not grow with their number.

    The backward pass rebuilds each state from the one after it, so it needs a reversible solver. Rounding makes the
    gradient inexact by as much as a round trip of the solver.
    """

    checkpointing = True
    needs_reversible_solver = True

    def num_steps(self, total: int) -> int:
        """See :class:`Gradient`."""
        return total


@dataclass(frozen=True)
class OneStep(Gradient):
    """The gradient of images that the network predicts in one step from latents on the way.

    The latents are sampled with the tokens as they are, without a gradient. From a noise level of each image, the
    network then predicts the clean latents at once, as in an edit of CASO, and the gradient goes back through this one
    prediction. The noisiest levels decide what an image shows, so the range begins there: the gradient reaches what
    the last steps do not, at the cost of one step; and the same latents serve for several optimizer steps. It is for
    class tokens.

    Args:
        start: first noise level that images are predicted from, as a share of the sampling steps.
        end: noise level where the range ends.
        reuse: batches that the latents of one batch serve for. The batches between are left out.

    Raises:
        UserError: if the range is empty or not within 0 and 1, or ``reuse`` is below 1.
    """

    start: float = 0.0
    end: float = 0.2
    reuse: int = 16
    checkpointing = False

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise UserError(
                f"start and end of OneStep must be 0 <= start < end <= 1, got {self.start:g} and {self.end:g}"
            )
        if self.reuse < 1:
            raise UserError(f"reuse of OneStep must be at least 1, got {self.reuse}")

    def num_steps(self, total: int) -> int:
        """Refuse to differentiate a sampler's steps.

        Raises:
            UserError: always.
        """
        raise UserError("OneStep is a gradient of class tokens only; use LastK, Detached or Checkpointed")

    def indices(self, total: int, batch: int, generator: torch.Generator) -> Tensor:
        """Random positions (batch,) int64 of the range within ``total`` sampling steps."""
        first = min(int(self.start * total), total - 1)
        return torch.randint(first, max(first + 1, round(self.end * total)), (batch,), generator=generator)
