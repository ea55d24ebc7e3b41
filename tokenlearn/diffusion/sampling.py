"""The one sampling function, with any solver and any gradient, and its way back."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from tokenlearn.diffusion.gradients import Gradient
from tokenlearn.diffusion.solvers.base import Callback, Model, Solver, StepOptions

M = TypeVar("M", bound=Model)


def sample(
    model: Model,
    latents: Tensor,
    *,
    solver: Solver,
    gradient: Gradient | None = None,
    generators: list[torch.Generator] | None = None,
    step_options: StepOptions | None = None,
    callback: Callback | None = None,
    from_timestep: int | None = None,
    to_timestep: int | None = None,
) -> Tensor:
    """Sample latents, differentiably as the gradient says.

    An outer ``torch.no_grad`` is respected. The network is evaluated with a graph only where a gradient can arise.

    Args:
        model: guided model. It must be deterministic, because recomputation does not restore random number generators.
        latents: (B, C, h, w) standard normal noise, scaled here to the solver's first noise level; or latents at the
            noise level of ``from_timestep``; or pairs (B, 2, C, h, w) that :func:`invert` made with the same
            reversible solver.
        solver: bound to a number of steps, see ``DiffusionBackbone.make_solver``.
        gradient: how the gradient goes back; None for no gradient.
        generators: one per sample, for schedulers that add noise; other solvers ignore them.
        step_options: further arguments of a scheduler's step by the step's index, such as DDIM's ``eta`` and
            ``variance_noise``.
        callback: called after every step with its index and the new latents. Reversible solvers do not call it.
        from_timestep: noise level of the latents; None for the solver's first.
        to_timestep: noise level of the result; None for clean latents.

    Returns:
        (B, C, h, w) float32 latents.

    Raises:
        ValueError: if a conditioning has neither 1 nor B rows.
        UserError: if the solver has no step between the timesteps, or the gradient does not fit the solver.
    """
    # Before the solver, so that a gradient of one row that all samples share is summed once, after all steps.
    model = expanded(model, len(latents))
    options: dict[str, Any] = {"generators": generators, "step_options": step_options, "callback": callback}
    return solver.sample(
        model, latents, gradient=gradient, from_timestep=from_timestep, to_timestep=to_timestep, **options
    )


def expanded(model: M, batch: int) -> M:
    """The model with as many rows in each conditioning as there are latents.

    Args:
        model: guided model.
        batch: number B of latents.

    Raises:
        ValueError: if a conditioning has neither 1 nor B rows.
    """
    for conditioning in model.conditionings:
        if len(conditioning) not in (1, batch):
            raise ValueError(f"a conditioning has {len(conditioning)} rows for {batch} latents; expected 1 or {batch}")
    return model.with_conditionings(
        [item if len(item) == batch else item.expand(batch) for item in model.conditionings]
    )
