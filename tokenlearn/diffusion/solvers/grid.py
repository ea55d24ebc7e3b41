"""The noise levels that a reversible solver visits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from tokenlearn.diffusion.process import Process
from tokenlearn.diffusion.solvers.base import nearest
from tokenlearn.errors import UserError


class Level(NamedTuple):
    """A noise level.

    Attributes:
        timestep: timestep that the network gets there.
        alpha: factor of the image in the latents.
        sigma: factor of the noise.
    """

    timestep: int
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """``s = sigma / alpha``, the time of the sampling equation."""
        return self.sigma / self.alpha


@dataclass(frozen=True)
class ReversibleGrid:
    """Noise levels of a solver, from noise to image.

    Attributes:
        levels: T + 1 levels of falling noise.
        middles: T levels, at the timestep of the training nearest to the middle of each step by ``s``. The network was
            trained at integer timesteps, and their alpha and sigma are exact.
    """

    levels: tuple[Level, ...]
    middles: tuple[Level, ...]

    @property
    def changes(self) -> list[float]:
        """Change of ``s`` in each of the T steps, all negative."""
        ratios = [level.ratio for level in self.levels]
        return [after - before for before, after in pairwise(ratios)]


def leading_timesteps(process: Process, steps: int, steps_offset: int) -> list[int]:
    """The timesteps of diffusers' leading spacing, ``offset + k (N // steps)``, from the noisiest on.

    Raises:
        UserError: if so many steps do not fit into the timesteps of the training.
    """
    most = process.num_timesteps
    if not 1 <= steps <= most:
        raise UserError(f"steps must be from 1 to {most}, got {steps}")
    timesteps = [steps_offset + index * (most // steps) for index in reversed(range(steps))]
    if not 0 <= timesteps[-1] <= timesteps[0] < most:
        raise UserError(
            f"{steps} steps with steps_offset {steps_offset} reach timestep {timesteps[0]} of {most}; take fewer steps"
        )
    return timesteps


def leading_grid(
    process: Process,
    steps: int,
    *,
    steps_offset: int = 1,
    set_alpha_to_one: bool = False,
    from_timestep: int | None = None,
    to_timestep: int | None = None,
) -> ReversibleGrid:
    """The levels of diffusers' ``DDIMScheduler`` with leading spacing, which has parameters of the same names.

    The levels are N timesteps of the training and the end, for any number of steps; none is interpolated. With
    ``steps_offset`` 0 the last timestep is the end already. Its step would cost an evaluation and change nothing, and
    O-BELM has no place for it, so the grid leaves it out.

    Args:
        process: noise process of the model.
        steps: steps from the first timestep to the end.
        steps_offset: the last timestep before the end.
        set_alpha_to_one: whether the end has no noise at all, in place of the noise of timestep 0. The network gets
            timestep 0 there either way; only an inversion evaluates it there.
        from_timestep: timestep of the noisiest level; None for the first.
        to_timestep: timestep of the least noisy level; None for the end.

    Returns:
        The grid.

    Raises:
        UserError: if the steps do not fit into the timesteps, a timestep is not one of the grid's, no step is left, or
            a level contains no image at all.
    """
    timesteps = leading_timesteps(process, steps, steps_offset)
    end = Level(0, 1.0, 0.0) if set_alpha_to_one else _level(process, 0)
    levels = [_level(process, timestep) for timestep in timesteps]
    levels += [end] if end != levels[-1] else []
    start = 0 if from_timestep is None else _index_of(from_timestep, timesteps)
    stop = len(levels) if to_timestep is None else _index_of(to_timestep, timesteps) + 1
    levels = levels[start:stop]
    if len(levels) < 2:
        raise UserError(f"there is no step from timestep {from_timestep} to {to_timestep}; take a lower to_timestep")
    if levels[0].alpha <= 0:
        raise UserError(f"alpha is {levels[0].alpha:g} at timestep {levels[0].timestep}; start at a later one")
    middles = [
        _level(process, process.timestep_of_ratio((before.ratio + after.ratio) / 2))
        for before, after in pairwise(levels)
    ]
    return ReversibleGrid(tuple(levels), tuple(middles))


def _level(process: Process, timestep: int) -> Level:
    at = torch.tensor(timestep, device=process.device)
    return Level(timestep, float(process.alpha(at)), float(process.sigma(at)))


def _index_of(timestep: int, timesteps: Sequence[int]) -> int:
    if timestep not in timesteps:
        raise UserError(
            f"timestep {timestep} is not one of the grid's {len(timesteps)}; take {nearest(timestep, timesteps)}, or "
            "another number of steps"
        )
    return timesteps.index(timestep)
