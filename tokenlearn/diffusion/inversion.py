"""From images back to noise."""

from __future__ import annotations

from torch import Tensor

from tokenlearn.diffusion.gradients import Gradient
from tokenlearn.diffusion.sampling import expanded, sample
from tokenlearn.diffusion.solvers.base import Callback, Model, Solver
from tokenlearn.diffusion.solvers.reversible import GridSolver


def invert(
    model: Model,
    latents: Tensor,
    *,
    solver: Solver,
    to_timestep: int | None = None,
    gradient: Gradient | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Noise of given latents, by the sampling equation followed backwards.

    A reversible solver inverts exactly: sample its result by the same solver and guided model to get the latents back.

    An inverse scheduler makes DDIM inversion (Song et al., 2021, https://arxiv.org/abs/2010.02502, section 4.3). A
    step of DDIM is an Euler step, so its inversion predicts noise where a step begins instead of where it ends, and is
    exact only in the limit of many steps. Guidance makes the error grow, so invert without guidance::

        noisy = invert(unguided, latents, solver=backbone.make_inverse_solver(50), to_timestep=401)
        edited = sample(guided, noisy, solver=backbone.make_solver("DDIM", 50), from_timestep=401)

    Args:
        model: guided model.
        latents: (B, C, h, w) clean latents.
        solver: a reversible solver, or one of diffusers' inverse schedulers, with its steps.
        to_timestep: noise level of the result; None for the noisiest.
        gradient: of an inverse scheduler, how the gradient goes back; None for a constant.
        callback: of an inverse scheduler, called after every step with its index and the new latents.

    Returns:
        (B, C, h, w) float32 latents at the noise level of ``to_timestep``; of a reversible solver pairs
        (B, 2, C, h, w).

    Raises:
        ValueError: if the scheduler is not an inverse one, and as :func:`tokenlearn.diffusion.sample` does.
        UserError: if the solver has no step to ``to_timestep``.
    """
    if isinstance(solver, GridSolver):
        return solver.invert(expanded(model, len(latents)), latents, to_timestep)
    if (timesteps := solver.timesteps)[0] > timesteps[-1]:
        raise ValueError("the solver goes from noise to images; use backbone.make_inverse_solver(steps)")
    return sample(model, latents, solver=solver, gradient=gradient, callback=callback, to_timestep=to_timestep)
