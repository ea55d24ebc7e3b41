"""Exactly invertible solvers of the sampling equation, as chains of linear stages around single network evaluations.

With ``y = x / alpha`` and ``s = sigma / alpha`` the probability-flow equation of a diffusion model is ``dy/ds = e(x)``
(Song et al., 2021, https://arxiv.org/abs/2010.02502, equation 14). An invertible solver carries a pair of tensors
``u`` (2) instead of ``y`` alone, and all of its steps consist of stages of one form,

    u' = M u + w e(alpha q.u),    with    q.M^-1 w = 0,

so that the point of evaluation is the same linear function of what comes out, ``q.u = (q M^-1).u'``: one evaluation
both makes ``u'`` from ``u`` and, on the way back, ``u`` from ``u'``. Nothing here touches the network; see
:mod:`tokenlearn.diffusion.reversible` for the chain that does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from tokenlearn.errors import UserError

Pair = tuple[float, float]


class Level(NamedTuple):
    """A noise level.

    Attributes:
        timestep: what the network is told there.
        alpha: factor of the image in the latents.
        sigma: factor of the noise.
    """

    timestep: int
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """``s = sigma / alpha``, the time of the equation."""
        return self.sigma / self.alpha


@dataclass(frozen=True)
class ReversibleGrid:
    """Noise levels that a chain visits, from noise to image.

    Attributes:
        levels: T + 1 levels, ever less noisy.
        middles: T levels, the training timestep nearest to the middle of each step, both by ``s``. An integer timestep
            is what networks were trained on, and its alpha and sigma are exact where a fraction's would be guesses.
    """

    levels: tuple[Level, ...]
    middles: tuple[Level, ...]

    @property
    def changes(self) -> list[float]:
        """Change of ``s`` in each of the T steps, all negative."""
        ratios = [level.ratio for level in self.levels]
        return [after - before for before, after in pairwise(ratios)]


def leading_grid(
    alphas: Tensor,
    sigmas: Tensor,
    num_inference_steps: int,
    steps_offset: int = 1,
    set_alpha_to_one: bool = False,
    from_timestep: int | None = None,
    to_timestep: int | None = None,
) -> ReversibleGrid:
    """The levels of diffusers' ``DDIMScheduler`` with leading spacing, whose parameters these are.

    They are N training timesteps ``offset + k (N // steps)`` and the end. Any number of steps has an exact grid: all
    of its levels are given by the tables, none by interpolation. Where the last timestep is that of the end already
    (offset 0), its step would do nothing but cost an evaluation, and has no place in O-BELM; the grid is without it.

    Args:
        alphas: (N,) factor of the image at each training timestep.
        sigmas: (N,) factor of the noise.
        num_inference_steps: steps from the first timestep to the end.
        steps_offset: the last timestep before the end.
        set_alpha_to_one: whether the end has no noise at all, instead of that of timestep 0. The network is told
            timestep 0 there either way; only an inversion asks it there.
        from_timestep: timestep of the noisiest level, one of the grid's; None for its first.
        to_timestep: timestep of the least noisy level; None for the end.

    Returns:
        The grid.

    Raises:
        UserError: if the steps do not fit into the timesteps, a timestep is not one of the grid's, no step is left, or
            a level has no image in it at all.
    """
    num_timesteps = len(alphas)
    if not 1 <= num_inference_steps <= num_timesteps:
        raise UserError(f"num_inference_steps must be from 1 to {num_timesteps}, got {num_inference_steps}")
    table = [Level(*row) for row in zip(range(num_timesteps), alphas.tolist(), sigmas.tolist(), strict=True)]
    spacing = num_timesteps // num_inference_steps
    timesteps = [steps_offset + index * spacing for index in reversed(range(num_inference_steps))]
    if not 0 <= timesteps[-1] <= timesteps[0] < num_timesteps:
        raise UserError(
            f"{num_inference_steps} steps with steps_offset {steps_offset} reach timestep {timesteps[0]} of "
            f"{num_timesteps}; take fewer steps"
        )
    end = Level(0, 1.0, 0.0) if set_alpha_to_one else table[0]
    levels = [table[timestep] for timestep in timesteps]
    levels += [end] if end != levels[-1] else []
    start = 0 if from_timestep is None else _index_of(from_timestep, timesteps)
    stop = len(levels) if to_timestep is None else _index_of(to_timestep, timesteps) + 1
    levels = levels[start:stop]
    if len(levels) < 2:
        raise UserError(f"there is no step from timestep {from_timestep} to {to_timestep}; take a lower to_timestep")
    if levels[0].alpha <= 0:
        raise UserError(f"alpha is {levels[0].alpha:g} at timestep {levels[0].timestep}; start at a later one")
    middles = [_middle(table, before, after) for before, after in pairwise(levels)]
    return ReversibleGrid(tuple(levels), tuple(middles))


def _index_of(timestep: int, timesteps: Sequence[int]) -> int:
    if timestep not in timesteps:
        near = sorted(timesteps, key=lambda other: abs(other - timestep))[:2]
        raise UserError(
            f"timestep {timestep} is not one of the grid's {len(timesteps)}; take {' or '.join(map(str, near))}, or "
            "another number of steps"
        )
    return timesteps.index(timestep)


def _middle(table: Sequence[Level], before: Level, after: Level) -> Level:
    """The training timestep nearest to the middle of a step."""
    middle = (before.ratio + after.ratio) / 2
    return min(table[after.timestep : before.timestep + 1], key=lambda level: abs(level.ratio - middle))


@dataclass(frozen=True)
class Stage:
    """``u' = M u + w e(alpha q.u)``: one evaluation of the network, and the linear update that it goes into.

    Attributes:
        step: index of the step that the stage belongs to, for the guidance rule.
        timestep: what the network is told.
        alpha: factor from ``y`` to the latents that the network is given.
        point: ``q``.
        matrix: rows of ``M``.
        weights: ``w``.
    """

    step: int
    timestep: int
    alpha: float
    point: Pair
    matrix: tuple[Pair, Pair]
    weights: Pair

    def inverse(self) -> Stage:
        """The stage from ``u'`` to ``u``, with the same evaluation."""
        (a, b), (c, d) = self.matrix
        determinant = a * d - b * c
        matrix = (d / determinant, -b / determinant), (-c / determinant, a / determinant)
        first, second = (row[0] * self.weights[0] + row[1] * self.weights[1] for row in matrix)
        point = tuple(self.point[0] * matrix[0][column] + self.point[1] * matrix[1][column] for column in (0, 1))
        return Stage(self.step, self.timestep, self.alpha, (point[0], point[1]), matrix, (-first, -second))


class ReversibleSolver(ABC):
    """A way to follow the equation over a grid that can be gone back exactly.

    A chain starts from the pair ``(y, y)``, which :meth:`start` and :meth:`start_inverse` turn into the solver's own.

    Attributes:
        noisy: weights of the pair that give ``y`` at the first level of a grid.
        clean: weights of the pair that give ``y`` at the last level.
    """

    noisy: Pair
    clean: Pair

    @abstractmethod
    def start(self, grid: ReversibleGrid) -> list[Stage]:
        """Stages from ``(y, y)`` at the first level to the pair that :meth:`steps` begin with."""

    @abstractmethod
    def start_inverse(self, grid: ReversibleGrid) -> list[Stage]:
        """Stages from ``(y, y)`` at the last level to the pair that :meth:`steps` end with."""

    @abstractmethod
    def steps(self, grid: ReversibleGrid) -> list[Stage]:
        """Stages between the two."""


@dataclass(frozen=True)
class Edict(ReversibleSolver):
    """EDICT (Wallace et al., 2022, https://arxiv.org/abs/2211.12446): two evaluations a step.

    Two copies of the latents step by DDIM in turns, each with the network's output for the other, and are then mixed.
    Which goes first alternates with the parity of the step; the network is told the step's timestep both times. The
    latents are the mean of the copies. Mixing draws the copies together by ``p^2`` a step, and going back drives their
    rounding error apart by as much: 1.4e3 times over 50 steps at the default.

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


@dataclass(frozen=True)
class AsynchronousLeapfrog(ReversibleSolver):
    """Asynchronous leapfrog without damping: one evaluation a step and one at the start, of second order.

    The solver of MALI (Zhuang et al., 2021, https://arxiv.org/abs/2102.04668) with eta = 1. The pair is
    ``y`` and its velocity ``v``: drift to the middle with the old velocity, replace it by ``2 e - v``, drift on to the
    end with the new one. The middle is a timestep of the training, so the two drifts differ a little in length;
    that costs no invertibility, and accuracy only as far as steps are as short as the training's. Rounding errors
    grow in neither direction, but neither does the solver damp what oscillates.
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


@dataclass(frozen=True)
class OBelm(ReversibleSolver):
    """O-BELM (Wang et al., 2024, https://arxiv.org/abs/2410.07273): one evaluation a step, second order.

    The pair is ``y`` at two neighbouring levels, and the next is a combination of both and of the noise prediction
    between them, the most accurate that needs no other. The first level but one comes from an Euler step, that is,
    DDIM's. Going back, rounding errors grow by the square of the ratio of the first to the last change of ``s``: 1.4e4
    for Stable Diffusion's schedule and 50 steps, more for fewer. Carry the pair in float64 where that matters.
    """

    noisy, clean = (1.0, 0.0), (0.0, 1.0)

    def start(self, grid: ReversibleGrid) -> list[Stage]:
        """An Euler step of the second of the pair."""
        return [self._euler(grid.levels[0], 0, (0.0, grid.changes[0]))]

    def start_inverse(self, grid: ReversibleGrid) -> list[Stage]:
        """An Euler step back of the first of the pair."""
        return [self._euler(grid.levels[-1], len(grid.changes) - 1, (-grid.changes[-1], 0.0))]

    def steps(self, grid: ReversibleGrid) -> list[Stage]:
        """One stage a step but for the first."""
        stages = []
        changes = grid.changes
        for step in range(1, len(changes)):
            level, ratio = grid.levels[step], changes[step] / changes[step - 1]
            matrix = (0.0, 1.0), (ratio**2, 1 - ratio**2)
            weights = (0.0, changes[step] * (1 + ratio))
            stages.append(Stage(step, level.timestep, level.alpha, (0.0, 1.0), matrix, weights))
        return stages

    @staticmethod
    def _euler(level: Level, step: int, weights: Pair) -> Stage:
        """From (y, y) to what an Euler step makes of one of them; the other is where it begins."""
        stays = (float(weights[0] == 0), float(weights[1] == 0))
        return Stage(step, level.timestep, level.alpha, stays, ((1.0, 0.0), (0.0, 1.0)), weights)


def _dot(a: Pair, b: Pair) -> float:
    return a[0] * b[0] + a[1] * b[1]
