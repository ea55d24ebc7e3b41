"""Exactly invertible solvers of the sampling equation, with gradients in memory that does not grow with the steps.

With ``y = x / alpha`` and ``s = sigma / alpha`` the probability-flow equation of a diffusion model is ``dy/ds = e(x)``
(Song et al., 2021, https://arxiv.org/abs/2010.02502, equation 14). A reversible solver carries a pair of tensors
``u`` (2) instead of ``y`` alone, and all of its steps consist of stages of one form,

    u' = M u + w e(alpha q.u),    with    q.M^-1 w = 0,

so that the point of evaluation is the same linear function of the result, ``q.u = (q M^-1).u'``: one evaluation
makes ``u'`` from ``u`` and, on the way back, ``u`` from ``u'``.

The gradient needs every pair ``u`` on the way, but does not store them. In the backward sweep each stage evaluates the
network once, with a graph, at the point that the pair after it gives. The value rebuilds the pair before it, and the
graph multiplies the gradient ``g`` by its Jacobian,

    g = M^T g' + q J^T (w.g'),    dL/dc += (de/dc)^T (w.g'),

``c`` being the conditioning. So a gradient costs as many evaluations backward as forward and holds one graph at a
time, like recomputing every step, but stores one pair instead of all latents. Rounding makes the rebuilt pairs differ
from the pairs of the forward sweep as much as a round trip does, and the gradient by as much.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenlearn.diffusion.gradients import Gradient, Reversible, Stored
from tokenlearn.diffusion.process import Process
from tokenlearn.diffusion.recomputation import autocast_settings, leaves_of, tensors_of, with_tensors
from tokenlearn.diffusion.solvers.base import Callback, Model, Solver, StepOptions
from tokenlearn.diffusion.solvers.grid import ReversibleGrid, leading_grid, leading_timesteps
from tokenlearn.errors import UserError

Pair = tuple[float, float]


@dataclass(frozen=True)
class Stage:
    """``u' = M u + w e(alpha q.u)``: one evaluation of the network and the linear update with its result.

    Attributes:
        step: index of the step that the stage belongs to, for the guidance rule.
        timestep: timestep that the network gets.
        alpha: factor from ``y`` to the latents that the network gets.
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
    """A solver of the sampling equation that can be followed back exactly.

    Sampling starts from the pair ``(y, y)``, which :meth:`start` and :meth:`start_inverse` turn into the solver's
    pair.

    Attributes:
        noisy: weights of the pair that give ``y`` at the first level of a grid.
        clean: weights of the pair that give ``y`` at the last level.
    """

    noisy: Pair
    clean: Pair

    @abstractmethod
    def start(self, grid: ReversibleGrid) -> list[Stage]:
        """Stages from ``(y, y)`` at the first level to the pair with which :meth:`steps` begin."""

    @abstractmethod
    def start_inverse(self, grid: ReversibleGrid) -> list[Stage]:
        """Stages from ``(y, y)`` at the last level to the pair with which :meth:`steps` end."""

    @abstractmethod
    def steps(self, grid: ReversibleGrid) -> list[Stage]:
        """Stages between the two."""


class ReversibleState(NamedTuple):
    """The pair (B, C, h, w) that a reversible solver carries, in ``y = x / alpha`` or its velocity."""

    first: Tensor
    second: Tensor


class GridSolver(Solver):
    """A reversible solver on the leading grid of a model's noise levels.

    Args:
        method: the reversible solver.
        process: noise process of the model.
        steps: number of steps from pure noise to the image.
        steps_offset: see :func:`tokenlearn.diffusion.solvers.grid.leading_grid`.
        set_alpha_to_one: see :func:`tokenlearn.diffusion.solvers.grid.leading_grid`.
        dtype: precision of the pair, float32 or float64. It bounds how exactly the solver is inverted, whatever the
            precision of the network.

    Raises:
        UserError: if ``dtype`` is a half precision.
    """

    def __init__(
        self,
        method: ReversibleSolver,
        process: Process,
        steps: int,
        *,
        steps_offset: int = 1,
        set_alpha_to_one: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise UserError(f"dtype {dtype} is too coarse for a reversible solver, whose rounding grows; use float32")
        self.method, self.process, self.steps = method, process, steps
        self.steps_offset, self.set_alpha_to_one, self.dtype = steps_offset, set_alpha_to_one, dtype

    @property
    def timesteps(self) -> list[int]:
        """See :class:`Solver`."""
        return leading_timesteps(self.process, self.steps, self.steps_offset)

    def grid(self, from_timestep: int | None = None, to_timestep: int | None = None) -> ReversibleGrid:
        """The solver's noise levels between two timesteps."""
        return leading_grid(
            self.process,
            self.steps,
            steps_offset=self.steps_offset,
            set_alpha_to_one=self.set_alpha_to_one,
            from_timestep=from_timestep,
            to_timestep=to_timestep,
        )

    def sample(
        self,
        model: Model,
        latents: Tensor,
        *,
        gradient: Gradient | None,
        generators: list[torch.Generator] | None,
        step_options: StepOptions | None,
        callback: Callback | None,
        from_timestep: int | None,
        to_timestep: int | None,
    ) -> Tensor:
        """See :func:`tokenlearn.diffusion.sample`.

        Raises:
            UserError: if the gradient is neither None, :class:`Reversible` nor :class:`Stored`, or it is reversible
                and guidance has a memory of earlier steps.
        """
        if gradient is not None and not isinstance(gradient, Reversible | Stored):
            raise UserError(
                f"gradient {type(gradient).__name__} does not fit solver {type(self.method).__name__}; set the "
                "gradient to Reversible, or to Stored where memory allows"
            )
        if isinstance(gradient, Reversible) and torch.is_grad_enabled() and model.has_memory:
            raise UserError(
                "gradient Reversible evaluates steps again in another order, which guidance with momentum does not "
                "allow; set momentum_scale to 0, or the gradient to Stored"
            )
        grid = self.grid(from_timestep, to_timestep)
        stages = self.method.steps(grid)
        if latents.ndim == 5:
            state = ReversibleState(*(latents.to(self.dtype) / grid.levels[0].alpha).unbind(dim=1))
        else:
            stages = self.method.start(grid) + stages
            state = self._both(latents, grid.levels[0].alpha)
        with torch.set_grad_enabled(torch.is_grad_enabled() and gradient is not None):
            state = run_stages(model, stages, state, constant_memory=isinstance(gradient, Reversible))
            return grid.levels[-1].alpha * _mix(self.method.clean, state)

    def invert(self, model: Model, latents: Tensor, to_timestep: int | None = None) -> Tensor:
        """Pairs (B, 2, C, h, w) from which :meth:`sample` gives the latents (B, C, h, w) back.

        It is exact up to rounding, which the solvers amplify as they say, for whatever the network predicts: with the
        bundled model, 20 or 50 steps, guidance 1 to 7.5 and float32, latents come back within 2e-5 of their norm. How
        likely the noise is under the model is another question.

        Args:
            model: guided model.
            latents: clean latents.
            to_timestep: noise level of the result; None for the noisiest.

        Returns:
            Both parts scaled as latents of that noise level are. EDICT's are its two copies, the others' are the
            latents and the second tensor of their pair.

        Raises:
            UserError: if ``to_timestep`` is not a timestep of the grid.
        """
        grid = self.grid(from_timestep=to_timestep)
        stages = self.method.start_inverse(grid) + [stage.inverse() for stage in reversed(self.method.steps(grid))]
        state = self._both(latents, grid.levels[-1].alpha)
        state = run_stages(model, stages, state, constant_memory=True)
        return grid.levels[0].alpha * torch.stack(state, dim=1)

    def _both(self, latents: Tensor, alpha: float) -> ReversibleState:
        """The pair (y, y) of latents at a level with an alpha."""
        scaled = latents.to(self.dtype) / alpha
        return ReversibleState(scaled, scaled)


def run_stages(
    model: Model, stages: Sequence[Stage], state: ReversibleState, constant_memory: bool
) -> ReversibleState:
    """The pair after all stages, differentiable by the pair before them and by the conditionings.

    Args:
        model: guided model. Rules with a memory of earlier steps give a wrong gradient: a step is combined again in
            the backward sweep. Parameters of the network and of the rule get no gradient.
        stages: stages of a solver.
        state: the pair before them.
        constant_memory: whether the backward sweep rebuilds the pairs; otherwise autograd stores every activation.
    """

    def predict(stage: Stage, point: Tensor, conditionings: Sequence[Any]) -> Tensor:
        """Guided noise prediction (B, C, h, w) at ``y``."""
        timestep = torch.full((), stage.timestep, device=point.device)
        guided = model.with_conditionings(conditionings)
        return guided.noise(stage.alpha * point, timestep, stage.step).to(point.dtype)

    if constant_memory and torch.is_grad_enabled():
        tensors = tensors_of(model.conditionings)
        found = _ConstantMemory.apply(predict, stages, model.conditionings, *state, *tensors)
        return ReversibleState(*found)
    return _through(predict, stages, state, model.conditionings)


_Predict = Callable[[Stage, Tensor, Sequence[Any]], Tensor]


def _through(
    predict: _Predict, stages: Sequence[Stage], state: ReversibleState, conditionings: Sequence[Any]
) -> ReversibleState:
    for stage in stages:
        state = _after(stage, state, predict(stage, _mix(stage.point, state), conditionings))
    return state


class _ConstantMemory(torch.autograd.Function):
    """Stages that store their last pair alone, and rebuild the others in the backward sweep."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's own contexts have no public type
        predict: _Predict,
        stages: Sequence[Stage],
        conditionings: Sequence[Any],
        first: Tensor,
        second: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        state = _through(predict, stages, ReversibleState(first, second), conditionings)
        ctx.predict, ctx.stages, ctx.conditionings = predict, stages, conditionings
        ctx.autocast = autocast_settings(first.device.type)
        ctx.save_for_backward(*state, *tensors)
        return state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - see forward
        first, second, *saved = ctx.saved_tensors
        state, gradient = ReversibleState(first, second), ReversibleState(*gradients)
        needed = ctx.needs_input_grad[-len(saved) :] if saved else ()
        tensors = leaves_of(saved, needed)
        leaves = [tensor for tensor in tensors if tensor.requires_grad]
        totals = [torch.zeros_like(leaf) for leaf in leaves]
        conditionings = with_tensors(ctx.conditionings, tensors)

        for stage in reversed(ctx.stages):
            inverse = stage.inverse()
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                point = _mix(inverse.point, state).requires_grad_()
                noise = ctx.predict(stage, point, conditionings)
            # Conditioning that the network, or the rule at this step, does not use gets zeros.
            of_point, *of_leaves = torch.autograd.grad(
                noise, [point, *leaves], _mix(stage.weights, gradient), materialize_grads=True
            )
            for total, part in zip(totals, of_leaves, strict=True):
                total += part
            state = _after(inverse, state, noise.detach())
            columns = zip(*stage.matrix, strict=True)
            gradient = ReversibleState(
                *(_mix((*column, q), (*gradient, of_point)) for column, q in zip(columns, stage.point, strict=True))
            )
        remaining = iter(totals)
        return None, None, None, *gradient, *(next(remaining) if need else None for need in needed)


def _after(stage: Stage, state: ReversibleState, noise: Tensor) -> ReversibleState:
    """``M u + w e``."""
    return ReversibleState(
        *(_mix((*row, w), (*state, noise)) for row, w in zip(stage.matrix, stage.weights, strict=True))
    )


def _mix(weights: Pair | tuple[float, ...], tensors: Sequence[Tensor]) -> Tensor:
    """Weighted sum of tensors, without those whose weight is 0."""
    terms = [weight * tensor for weight, tensor in zip(weights, tensors, strict=True) if weight != 0]
    return sum(terms[1:], terms[0])
