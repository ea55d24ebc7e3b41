"""Solver of any diffusers scheduler, forward from noise to images or inverse from images to noise."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenlearn.diffusion.gradients import Gradient
from tokenlearn.diffusion.solvers.base import Callback, Model, Solver, StepOptions, nearest
from tokenlearn.errors import UserError


class Scheduler(Protocol):
    """The part of diffusers' schedulers that sampling uses.

    Schedulers of noise processes also have ``init_noise_sigma`` and ``scale_model_input``; schedulers of flows start
    from unit noise and give the network the latents as they are.
    """

    timesteps: Any
    set_timesteps: Callable[..., None]
    step: Callable[..., Any]


class SchedulerSolver(Solver):
    """A diffusers scheduler with a number of steps.

    Sampling works on a copy of the scheduler, so the history of multi-step schedulers, and the graph that hangs on it,
    ends with the call.

    Args:
        scheduler: a diffusers scheduler.
        steps: number of steps asked of the scheduler. Some schedulers make more (PNDM one, Heun about twice as many).

    Attributes:
        scheduler, steps: as given.
    """

    def __init__(self, scheduler: Scheduler, steps: int) -> None:
        self.scheduler, self.steps = scheduler, steps

    @property
    def timesteps(self) -> list[int]:
        """See :class:`Solver`."""
        timesteps: list[int] = self._started(torch.device("cpu")).timesteps.tolist()
        return timesteps

    def _started(self, device: torch.device) -> Scheduler:
        scheduler = copy.copy(self.scheduler)
        scheduler.set_timesteps(self.steps, device=device)
        return scheduler

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
            UserError: if the gradient needs a reversible solver, or the scheduler cannot go from ``from_timestep`` to
                ``to_timestep``.
            ValueError: for pairs of latents, which reversible solvers make.
        """
        if gradient is not None and gradient.needs_reversible_solver:
            raise UserError(
                f"gradient {type(gradient).__name__} needs a reversible solver, not "
                f"{type(self.scheduler).__name__}; set the solver to EDICT, Leapfrog or OBELM, or the gradient to "
                "Checkpointed"
            )
        if latents.ndim != 4:
            raise ValueError(f"a scheduler starts from (B, C, h, w) latents, got {tuple(latents.shape)}")
        scheduler = self._started(latents.device)
        timesteps = _timesteps_between(scheduler, from_timestep, to_timestep)
        total = len(timesteps)
        end = None if to_timestep is None else torch.as_tensor(to_timestep, device=latents.device)
        model.begin(timesteps, end, generators)
        differentiated = 0 if gradient is None else gradient.num_steps(total)
        recompute = gradient is not None and gradient.checkpointing and differentiated > 1
        detach_inputs = gradient is not None and gradient.detach_inputs
        takes_generator = generators is not None and "generator" in inspect.signature(scheduler.step).parameters
        common_options = {"generator": generators} if takes_generator else {}

        latents = latents.float()
        if from_timestep is None:
            latents = latents * _first_sigma(scheduler)
        for index, timestep in enumerate(timesteps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= total - differentiated):
                inputs = _network_inputs(scheduler, latents, timestep)
                if detach_inputs:
                    inputs = inputs.detach()
                output = model(inputs, timestep, index, recompute)
                options = common_options | dict(step_options(index) if step_options else {})
                # Never recomputed: a scheduler's step changes its state.
                latents = scheduler.step(output, timestep, latents, return_dict=False, **options)[0]
            if callback is not None:
                callback(index, latents)
        return latents


def _first_sigma(scheduler: Scheduler) -> Any:  # noqa: ANN401 - a number or a tensor, by scheduler
    """Standard deviation of the noise that the scheduler starts from."""
    return getattr(scheduler, "init_noise_sigma", 1.0)


def _network_inputs(scheduler: Scheduler, latents: Tensor, timestep: Tensor) -> Tensor:
    """The network's input for latents at a timestep."""
    scale: Callable[..., Tensor] | None = getattr(scheduler, "scale_model_input", None)
    return latents if scale is None else scale(latents, timestep)


def _timesteps_between(scheduler: Scheduler, first: int | None, last: int | None) -> Tensor:
    """Timesteps of the steps from the noise level ``first`` to ``last``; UserError if there are none."""
    timesteps: Tensor = scheduler.timesteps
    if first is None and last is None:
        return timesteps
    known = timesteps.tolist()
    # A step of an inverse scheduler ends at its timestep, a step of any other begins there.
    inverse = known[0] < known[-1]
    for level, levels in ((first, known), (last, known if inverse else known[1:])):
        if level is not None and level not in levels:
            raise UserError(
                f"timestep {level} is not one of the scheduler's {len(known)}; take {nearest(level, levels)}, or "
                "another number of steps"
            )
    # Latents of sigma-scaled schedulers (Euler) have another size at later timesteps, and for those that visit a
    # timestep twice (PNDM, Heun) the timestep does not say which visit is meant.
    if first is not None and (float(_first_sigma(scheduler)) != 1 or len(set(known)) < len(known)):
        raise UserError(f"{type(scheduler).__name__} cannot start at timestep {first}; use the DDIM scheduler")
    start = 0 if first is None else known.index(first)
    stop = len(known) if last is None else known.index(last) + inverse
    if start >= stop:
        raise UserError(f"the scheduler has no step from timestep {first} to {last}; exchange them")
    return timesteps[start:stop]
