"""Asynchronous leapfrog: the latents and their velocity."""

from __future__ import annotations

from dataclasses import dataclass

from tokenlearn.diffusion.solvers.grid import Level, ReversibleGrid
from tokenlearn.diffusion.solvers.reversible import ReversibleSolver, Stage


@dataclass(frozen=True)
class Leapfrog(ReversibleSolver):
    """Asynchronous leapfrog without damping: one evaluation a step and one at the start, of second order.

    The solver of MALI (Zhuang et al., 2021, https://arxiv.org/abs/2102.04668) with eta = 1. The pair is
    ``y`` and its velocity ``v``: drift to the middle with the old velocity, replace it by ``2 e - v``, drift on to the
    end with the new velocity. The middle is a timestep of the training, so the two drifts differ a little in length;
    the solver stays invertible, and loses accuracy only where steps are as short as the training's. Rounding errors
    grow in neither direction, but the solver does not damp oscillations: at guidance 7.5 it is worse than DDIM in few
    steps (error 0.36 to 0.08 in 10 steps on a mixture with an exact solution, 0.04 to 0.05 in 20).
    """

    noisy = clean = (1.0, 0.0)

    def start(self, grid: ReversibleGrid) -> list[Stage]:
        """The first velocity."""
        return [self._velocity(grid.levels[0], 0)]

    def start_inverse(self, grid: ReversibleGrid) -> list[Stage]:
        """The last velocity."""
        return [self._velocity(grid.levels[-1], len(grid.middles) - 1)]

    def steps(self, grid: ReversibleGrid) -> list[Stage]:
        """One stage a step."""
        stages = []
        for step, middle in enumerate(grid.middles):
            to_middle = middle.ratio - grid.levels[step].ratio
            to_end = grid.levels[step + 1].ratio - middle.ratio
            matrix = (1.0, to_middle - to_end), (0.0, -1.0)
            weights = (2 * to_end, 2.0)
            stages.append(Stage(step, middle.timestep, middle.alpha, (1.0, to_middle), matrix, weights))
        return stages

    @staticmethod
    def _velocity(level: Level, step: int) -> Stage:
        """From (y, y) to (y, e)."""
        return Stage(step, level.timestep, level.alpha, (1.0, 0.0), ((1.0, 0.0), (-1.0, 1.0)), (0.0, 1.0))
