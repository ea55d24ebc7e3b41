"""EDICT: two copies of the latents that step in turns."""

from __future__ import annotations

from dataclasses import dataclass

from tokenlearn.diffusion.solvers.grid import ReversibleGrid
from tokenlearn.diffusion.solvers.reversible import Pair, ReversibleSolver, Stage
from tokenlearn.errors import UserError


@dataclass(frozen=True)
class EDICT(ReversibleSolver):
    """EDICT (Wallace et al., 2022, https://arxiv.org/abs/2211.12446): two evaluations a step.

    Two copies of the latents step by DDIM in turns, each with the network's output for the other, and are then mixed.
    The leading copy alternates from step to step; the network gets the step's timestep both times. The latents are the
    mean of the copies. Mixing brings the copies together by ``p^2`` a step, and the way back drives their rounding
    error apart by as much: 1.4e3 times over 50 steps at the default.

    Args:
        mixing: ``p``, in (0, 1]; 1 leaves the copies apart.

    Raises:
        UserError: if it is out of range.
    """

    mixing: float = 0.93
    noisy = clean = (0.5, 0.5)

    def __post_init__(self) -> None:
        if not 0 < self.mixing <= 1:
            raise UserError(f"EDICT's mixing must be above 0 and at most 1, got {self.mixing}")

    def start(self, grid: ReversibleGrid) -> list[Stage]:
        """None: the copies start as one."""
        return []

    def start_inverse(self, grid: ReversibleGrid) -> list[Stage]:
        """None: the copies start as one."""
        return []

    def steps(self, grid: ReversibleGrid) -> list[Stage]:
        """Two stages a step, of which the second mixes."""
        p = self.mixing
        one_by_one = (1.0, 0.0), (0.0, 1.0)
        # a <- p a + (1 - p) b, then b <- p b + (1 - p) a with the new a.
        mixed = (p, 1 - p), (p * (1 - p), p + (1 - p) ** 2)
        stages = []
        for step, change in enumerate(grid.changes):
            before, after = grid.levels[step : step + 2]
            leads, follows = one_by_one if step % 2 == 0 else one_by_one[::-1]
            weights = (change * leads[0], change * leads[1])
            stages.append(Stage(step, before.timestep, before.alpha, follows, one_by_one, weights))
            weights = (change * _dot(mixed[0], follows), change * _dot(mixed[1], follows))
            stages.append(Stage(step, before.timestep, after.alpha, leads, mixed, weights))
        return stages


def _dot(a: Pair, b: Pair) -> float:
    return a[0] * b[0] + a[1] * b[1]
