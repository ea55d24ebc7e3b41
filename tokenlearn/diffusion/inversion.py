"""From images back to the noise that they could have been drawn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tokenlearn.diffusion.sampling import C, Scheduler, sample


def _only(predictions: Sequence[Tensor], step: int) -> Tensor:
    """The prediction for the one conditioning there is."""
    (prediction,) = predictions
    return prediction


def invert(
    model: Callable[[Tensor, Tensor, C], Tensor],
    scheduler: Scheduler,
    latents: Tensor,
    conditionings: Sequence[C],
    num_inversion_steps: int,
    to_timestep: int | None = None,
    combine: Callable[[Sequence[Tensor], int], Tensor] = _only,
    gradient_steps: int | None = 0,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Noise of given latents, by running the sampler's differential equation backwards.

    DDIM (Song et al., 2021, https://arxiv.org/abs/2010.02502, section 4.3) is an Euler step, so its inversion predicts
    noise where a step begins instead of where it ends, and is exact only in the limit of many steps; guidance makes
    the error grow, so invert without any. Denoise the result with the same number of steps::

        inverse = DDIMInverseScheduler.from_config(ddim.config)
        noisy = invert(backbone, inverse, latents, [empty], 50, to_timestep=401)
        edited = sample(backbone, ddim, noisy, [empty, prompt], guidance, 50, from_timestep=401)

    Args:
        model: network, see :func:`tokenlearn.diffusion.sample`.
        scheduler: one of diffusers' inverse schedulers, made from the configuration of that which will denoise.
        latents: (B, C, h, w) clean latents.
        conditionings: what the network is evaluated for, each of B rows, or of one row that all samples share.
        num_inversion_steps: steps from clean latents to pure noise, of which ``to_timestep`` leaves out the last.
        to_timestep: noise level of the result, one of the scheduler's timesteps; None for the last.
        combine: guidance rule; by default there is one conditioning, whose prediction is taken.
        gradient_steps: how many of the last steps are differentiated, None for all; by default the result is a
            constant.
        callback: called after every step with its index and the new latents.

    Returns:
        (B, C, h, w) float32 latents at the noise level of ``to_timestep``.

    Raises:
        ValueError: if the scheduler is not an inverse one, and as :func:`tokenlearn.diffusion.sample` does.
        UserError: if ``to_timestep`` is not one of the scheduler's timesteps.
    """
    if scheduler.timesteps[0] > scheduler.timesteps[-1]:
        name = type(scheduler).__name__
        raise ValueError(f"{name} goes from noise to images; make a DDIMInverseScheduler from its configuration")
    return sample(
        model,
        scheduler,
        latents,
        conditionings,
        combine,
        num_inversion_steps,
        gradient_steps,
        callback=callback,
        to_timestep=to_timestep,
    )
