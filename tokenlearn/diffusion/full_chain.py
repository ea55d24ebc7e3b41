"""How a gradient goes through all of sampling: one setting for every method."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tokenlearn.diffusion.reversible import ReversibleState, invert_reversible, sample_reversible
from tokenlearn.diffusion.reversible_solvers import (
    AsynchronousLeapfrog,
    Edict,
    OBelm,
    ReversibleGrid,
    ReversibleSolver,
    leading_grid,
)
from tokenlearn.diffusion.sampling import C, sample
from tokenlearn.errors import UserError

GradientChain = Literal["checkpointed", "edict", "leapfrog", "o_belm"]
"""How a gradient goes through sampling.

``checkpointed``
    DDIM, every step evaluated again on the way back. It stores one latent per step, and has the exact gradient.
``edict``
    The exactly invertible chain that DOODL is published with, at two evaluations a step.
``leapfrog``, ``o_belm``
    Exactly invertible chains of second order at one evaluation a step.

``checkpointed`` is the default wherever nothing has to be inverted. On the bundled model at guidance 1, 3 and 7.5 it
takes 0.48, 0.53 and 0.51 of EDICT's time, as the other two do, and draws what DDIM draws. Its gradient is that of
stored activations, to the bit; those of EDICT are 1e-6, 5e-6 and 2e-5 away, of leapfrog 2e-6, 8e-6 and 7e-5, of O-BELM
1e-4, 1e-4 and 1e-3. The latents that it stores at each step are small beside one evaluation's activations: its peak
memory at 50 steps is 1.01 times that at 10, with leapfrog's 1.00, and lower (``benchmarks/full_chain.py``).
"""

REVERSIBLE: Mapping[GradientChain, ReversibleSolver] = {
    "edict": Edict(),
    "leapfrog": AsynchronousLeapfrog(),
    "o_belm": OBelm(),
}


class ChainModel(Protocol):
    """What the chains need of a diffusion model; a backbone has it."""

    @property
    def alphas(self) -> Tensor:
        """(N,) factor of the image at each training timestep."""

    @property
    def sigmas(self) -> Tensor:
        """(N,) factor of the noise."""

    def __call__(self, latents: Tensor, timesteps: Tensor, conditioning: Any, /) -> Tensor:  # noqa: ANN401 - any kind of rows
        """Prediction (B, C, h, w) of the kind that the scheduler expects."""

    def predict_noise(self, latents: Tensor, timesteps: Tensor, conditioning: Any, /) -> Tensor:  # noqa: ANN401 - as above
        """Noise prediction (B, C, h, w)."""


def sample_full_chain(
    model: ChainModel,
    scheduler: Any,  # noqa: ANN401 - diffusers' schedulers share no base class
    latents: Tensor,
    conditionings: Sequence[C],
    combine: Callable[[Sequence[Tensor], int], Tensor],
    num_inference_steps: int,
    chain: GradientChain = "checkpointed",
    from_timestep: int | None = None,
    to_timestep: int | None = None,
) -> Tensor:
    """Sample latents so that a gradient reaches where they start, and the conditionings, through every step.

    Both timesteps are noise levels: what starts at one may go on where it ended. An outer ``torch.no_grad`` is
    respected.

    Args:
        model: the diffusion model.
        scheduler: DDIM's; the reversible chains take its timesteps from it and not its clipping.
        latents: (B, C, h, w) at the first noise level; or pairs (B, 2, C, h, w) of :func:`invert_full_chain` by the
            same chain.
        conditionings: what the network is evaluated for, see :func:`tokenlearn.diffusion.sample`.
        combine: guidance rule without a memory of earlier steps.
        num_inference_steps: steps from pure noise to the end, of which those between the levels are made.
        chain: how.
        from_timestep: noise level of ``latents``, a timestep of the scheduler's; None for its first.
        to_timestep: noise level to stop at; None for clean latents.

    Returns:
        (B, C, h, w) float32 latents at the last noise level.

    Raises:
        UserError: if there is no step between the timesteps, or the chain cannot follow the scheduler.
        ValueError: for pairs without a reversible chain.
    """
    if chain == "checkpointed":
        if latents.ndim != 4:
            raise ValueError(f"checkpointed sampling starts from (B, C, h, w) latents, got {tuple(latents.shape)}")
        last = None if to_timestep is None else _step_before(scheduler, num_inference_steps, to_timestep)
        return sample(
            model,
            scheduler,
            latents,
            conditionings,
            combine,
            num_inference_steps,
            from_timestep=from_timestep,
            to_timestep=last,
        )
    grid = _grid(model, scheduler, num_inference_steps, from_timestep, to_timestep)
    start: Tensor | ReversibleState = latents
    if latents.ndim == 5:
        start = ReversibleState(*(latents / grid.levels[0].alpha).unbind(dim=1))
    return sample_reversible(model.predict_noise, grid, start, conditionings, combine, REVERSIBLE[chain])


def invert_full_chain(
    model: ChainModel,
    scheduler: Any,  # noqa: ANN401 - see sample_full_chain
    latents: Tensor,
    conditionings: Sequence[C],
    combine: Callable[[Sequence[Tensor], int], Tensor],
    num_inference_steps: int,
    chain: GradientChain,
    to_timestep: int | None = None,
) -> Tensor:
    """What :func:`sample_full_chain` makes given clean latents of again, by the same chain and guidance.

    Args:
        model: the diffusion model.
        scheduler: as in :func:`sample_full_chain`.
        latents: (B, C, h, w) clean latents.
        conditionings: what the network is evaluated for.
        combine: guidance rule.
        num_inference_steps: steps from pure noise to the end.
        chain: a reversible one.
        to_timestep: noise level to stop at; None for the noisiest.

    Returns:
        (B, 2, C, h, w) float32 pairs, both scaled as latents of that noise level are. For EDICT they are its two
        copies, for the others the latents and what the solver carries with them.

    Raises:
        UserError: if the chain is not reversible, or has no step to the timestep.
    """
    if chain == "checkpointed":
        raise UserError(
            f"chain 'checkpointed' cannot be followed backwards exactly; take one of {', '.join(REVERSIBLE)}"
        )
    grid = _grid(model, scheduler, num_inference_steps, to_timestep, None)
    state = invert_reversible(model.predict_noise, grid, latents, conditionings, combine, REVERSIBLE[chain])
    return grid.levels[0].alpha * torch.stack(state, dim=1)


def _step_before(scheduler: Any, num_inference_steps: int, timestep: int) -> int:  # noqa: ANN401 - as above
    """The timestep of the step that ends at the noise level of ``timestep``."""
    scheduler = copy.copy(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    known: list[int] = scheduler.timesteps.tolist()
    if timestep not in known[1:]:
        near = sorted(known[1:], key=lambda other: abs(other - timestep))[:2]
        raise UserError(
            f"no step of {num_inference_steps} ends at timestep {timestep}; take {' or '.join(map(str, near))}, or "
            "another number of steps"
        )
    return known[known.index(timestep) - 1]


def _grid(
    model: ChainModel,
    scheduler: Any,  # noqa: ANN401 - as above
    num_inference_steps: int,
    from_timestep: int | None,
    to_timestep: int | None,
) -> ReversibleGrid:
    """The scheduler's noise levels."""
    config = scheduler.config
    if config.timestep_spacing != "leading":
        raise UserError(
            "reversible chains need the scheduler's timestep_spacing 'leading', not "
            f"'{config.timestep_spacing}'; take chain 'checkpointed'"
        )
    return leading_grid(
        model.alphas,
        model.sigmas,
        num_inference_steps,
        config.steps_offset,
        config.set_alpha_to_one,
        from_timestep,
        to_timestep,
    )
