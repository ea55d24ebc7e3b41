"""Edit-friendly inversion: noise for every step, from which DDPM's sampler reproduces an image exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenlearn.diffusion.process import add_noise
from tokenlearn.diffusion.sampling import sample
from tokenlearn.diffusion.solvers.base import Model
from tokenlearn.diffusion.solvers.scheduler import SchedulerSolver

_DDPM = 1.0  # eta at which a step of DDIM's scheduler adds as much noise as DDPM does

# Of a schedule that starts at pure noise, alpha = 0. There the scheduler takes the root of 1 - alpha_prev^2 minus the
# square of the deviation, which are equal: rounding makes that negative.
_ALMOST_DDPM = 1 - 2**-21


@dataclass(frozen=True)
class Inverted:
    """Noise of given latents, with everything that sampling needs to lead back to them.

    Attributes:
        latents: (B, C, h, w) at the noise level at which sampling starts, or pairs (B, 2, C, h, w) of a reversible
            solver, see :func:`tokenlearn.diffusion.invert`.
        step_noise: (B, T, C, h, w) noise that each of the T steps adds, in units of the step's own deviation; None for
            deterministic steps.
        remainder: (B, C, h, w) to be added to the sampled latents; None for nothing.
        eta: deviation of each step's noise relative to DDPM's.
    """

    latents: Tensor
    step_noise: Tensor | None = None
    remainder: Tensor | None = None
    eta: float = _DDPM

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.latents.device

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.latents)

    def expand(self, batch: int) -> Inverted:
        """One row as ``batch`` rows that share its memory."""
        return self._map(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    def repeat_interleave(self, repeats: int, dim: int = 0) -> Inverted:
        """Each row ``repeats`` times, one after another: a a b b; rows are dimension 0, as in a tensor's method."""
        return self._map(lambda tensor: tensor.repeat_interleave(repeats, dim))

    def step_options(self, step: int) -> dict[str, Any]:
        """The argument of that name of :func:`tokenlearn.diffusion.sample`."""
        return {} if self.step_noise is None else {"eta": self.eta, "variance_noise": self.step_noise[:, step]}

    def finish(self, sampled: Tensor) -> Tensor:
        """Clean latents (B, C, h, w) from sampled ones."""
        return sampled if self.remainder is None else sampled + self.remainder

    def _map(self, function: Callable[[Tensor], Tensor]) -> Inverted:
        return Inverted(
            function(self.latents),
            None if self.step_noise is None else function(self.step_noise),
            None if self.remainder is None else function(self.remainder),
            self.eta,
        )


def edit_friendly_noise(
    model: Model,
    latents: Tensor,
    *,
    solver: SchedulerSolver,
    generators: Sequence[torch.Generator],
    from_timestep: int | None = None,
) -> Inverted:
    """Noise with which DDPM's sampler gives the latents back, exactly with any number of steps.

    Algorithm 1 of Huberman-Spiegelglas et al., 2024 (https://arxiv.org/abs/2304.06140). The latents of every timestep
    are sampled from the clean latents, each with independent noise ``e_t``, and the noise of a step is the one that
    leads from one timestep's latents to the next::

        x_t = alpha_t x_0 + sigma_t e_t,    z_t = (x_{t-1} - mean_t(x_t)) / deviation_t

    Since the ``e_t`` are independent, a step's noise is larger than DDPM's and holds the image's structure, which
    stays when the same noise is sampled with under another guidance::

        noisy = edit_friendly_noise(unguided, latents, solver=ddim, generators=generators, from_timestep=801)
        edited = noisy.finish(
            sample(guided, noisy.latents, solver=ddim, step_options=noisy.step_options, from_timestep=801)
        )

    The model may be guided by a prompt that describes the image; the same guided model then gives the image back. Each
    step starts at the result of the step before it, not at the sampled latents, so that rounding errors do not add up.
    The last step has no deviation where a schedule ends without any noise; the :attr:`Inverted.remainder` is what the
    mean lacks there, and otherwise a rounding error.

    The noise of the last step is kept as it is found. The authors' code sets it to 0, which loses some of the image's
    detail and edits differently by a few per cent.

    Args:
        model: guided model from which the means of the steps are computed.
        latents: (B, C, h, w) clean latents ``x_0``.
        solver: the DDIM scheduler that will denoise, with its steps.
        generators: one per sample, so that a batch is the same as its samples one by one.
        from_timestep: noise level of the result, one of the scheduler's timesteps; None for its first.

    Returns:
        Float32 latents, and noise of as many steps as there are from ``from_timestep`` on; constants.

    Raises:
        ValueError: if there are not as many generators as latents, and as :func:`tokenlearn.diffusion.sample` does.
        UserError: if ``from_timestep`` is not one of the scheduler's timesteps.
    """
    if len(generators) != len(latents):
        raise ValueError(f"{len(generators)} generators for {len(latents)} latents")
    latents = latents.float()
    scheduler: Any = copy.copy(solver.scheduler)
    scheduler.set_timesteps(solver.steps)
    timesteps: Tensor = scheduler.timesteps
    if from_timestep is not None:
        timesteps = timesteps[timesteps <= from_timestep]
    alphas_cumprod = scheduler.alphas_cumprod[timesteps]
    eta = _ALMOST_DDPM if (alphas_cumprod == 0).any() else _DDPM
    targets = iter([*_noised(latents, alphas_cumprod, generators), latents])
    step_noise: list[Tensor] = []

    def step_with(noise: Tensor, output: Tensor, timestep: Tensor, current: Tensor) -> Tensor:
        result: tuple[Tensor, ...] = scheduler.step(
            output, timestep, current, eta=eta, variance_noise=noise, return_dict=False
        )
        return result[0]

    def step_to_target(output: Tensor, timestep: Tensor, current: Tensor, return_dict: bool) -> tuple[Tensor]:
        """The scheduler's step with the noise that leads to the next target."""
        nothing = current.new_zeros(())
        # The mean for output 0 at latents 0 is 0, whatever the kind of prediction.
        deviation = step_with(nothing + 1, nothing, timestep, nothing)
        missing = next(targets) - step_with(nothing, output, timestep, current)
        step_noise.append(missing / deviation if deviation > 0 else torch.zeros_like(missing))
        return (step_with(step_noise[-1], output, timestep, current),)

    # The sampler itself makes the steps, so that it meets the very same numbers when it makes them again.
    towards_targets = copy.copy(scheduler)
    towards_targets.step = step_to_target
    start = next(targets)
    arrived = sample(model, start, solver=SchedulerSolver(towards_targets, solver.steps), from_timestep=from_timestep)
    return Inverted(start, torch.stack(step_noise, dim=1), latents - arrived, eta)


def _noised(latents: Tensor, alphas_cumprod: Tensor, generators: Sequence[torch.Generator]) -> list[Tensor]:
    """Clean latents (B, C, h, w) with independent noise at each of several levels."""
    shape = (len(alphas_cumprod), *latents.shape[1:])
    noise = torch.stack(
        [torch.randn(shape, generator=generator, device=generator.device) for generator in generators], dim=1
    ).to(latents.device)
    return [
        add_noise(latents, level_noise, alpha_squared.sqrt(), (1 - alpha_squared).sqrt())
        for level_noise, alpha_squared in zip(noise, alphas_cumprod, strict=True)
    ]
