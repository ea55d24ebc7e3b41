"""Training-free guidance: every step of the sampler climbs an objective in several ways at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from tokenlearn.diffusion.process import convert
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.guidance.base import C, GuidanceRule, Level, Predictor, Run
from tokenlearn.guidance.classifier_free import ClassifierFreeGuidance
from tokenlearn.losses.objective import Objective, as_objective

Schedule = Literal["increase", "decrease", "constant"]
"""How a strength changes along a run: as ``a_t``, as ``1 - a_t``, or not; see :func:`strengths`."""

LogDensity = Callable[[Tensor], Tensor]
"""Clean latents (B, C, h, w) to the logarithm (B,) of an unnormalised density."""


@dataclass(frozen=True, kw_only=True)
class TFGSettings:
    """Strengths of training-free guidance; earlier methods are special cases, which the constructors name.

    Attributes:
        rho: mean of ``rho_t``; 0 leaves out the gradient through the network, and with it two thirds of the cost.
        mu: mean of ``mu_t``; 0 leaves out the steps without the network.
        recurrence: evaluations of each sampling step.
        iterations: steps on x0 in each.
        samples: noisy copies of x0.
        smoothing: deviation of their noise; ``smoothing_t`` is its product with the schedule.
        rho_schedule: see :func:`strengths`.
        mu_schedule: see :func:`strengths`.
        smoothing_schedule: ``decrease`` for the deviation ``sigma`` of the noise in the latents, or ``constant``.

    Raises:
        UserError: if a number is out of range, a schedule has another name, or copies without noise are asked for.
    """

    rho: float = 1.0
    mu: float = 1.0
    recurrence: int = 1
    iterations: int = 4
    samples: int = 1
    smoothing: float = 0.0
    rho_schedule: Schedule = "increase"
    mu_schedule: Schedule = "increase"
    smoothing_schedule: Literal["decrease", "constant"] = "decrease"

    def __post_init__(self) -> None:
        for name in ("rho", "mu", "smoothing"):
            if not math.isfinite(number := getattr(self, name)):
                raise UserError(f"tfg.{name} must be a finite number, got {number}")
        check_at_least("tfg", 1, recurrence=self.recurrence, samples=self.samples)
        check_at_least("tfg", 0, iterations=self.iterations, smoothing=self.smoothing)
        if self.samples > 1 and not self.smoothing:
            raise UserError(
                f"tfg.samples {self.samples} are copies without noise; set tfg.smoothing above 0, or tfg.samples to 1"
            )
        for name in ("rho_schedule", "mu_schedule"):
            if (schedule := getattr(self, name)) not in get_args(Schedule):
                raise UserError(f"tfg.{name} must be increase, decrease or constant, got '{schedule}'")
        if self.smoothing_schedule not in ("decrease", "constant"):
            raise UserError(f"tfg.smoothing_schedule must be decrease or constant, got '{self.smoothing_schedule}'")

    @property
    def cost(self) -> int:
        """Evaluations of the network in place of one, a backward pass counted as two."""
        return self.recurrence * (3 if self.rho else 1)

    @classmethod
    def dps(cls, rho: float = 1.0) -> Self:
        """Diffusion posterior sampling (Chung et al., ICLR 2023, https://arxiv.org/abs/2209.14687): rho alone."""
        return cls(rho=rho, mu=0.0, iterations=0, rho_schedule="constant")

    @classmethod
    def lgd(cls, rho: float = 1.0, *, smoothing: float = 0.1, samples: int = 4) -> Self:
        """Loss-guided diffusion (Song et al., ICML 2023): :meth:`dps` of a smoothed objective."""
        return cls(rho=rho, mu=0.0, iterations=0, samples=samples, smoothing=smoothing, rho_schedule="constant")

    @classmethod
    def mpgd(cls, mu: float = 1.0) -> Self:
        """Manifold-preserving guided diffusion (He et al., ICLR 2024): one step on x0, no gradient of the network."""
        return cls(rho=0.0, mu=mu, iterations=1, mu_schedule="constant")

    @classmethod
    def freedom(cls, rho: float = 1.0, *, recurrence: int = 4) -> Self:
        """FreeDoM (Yu et al., ICCV 2023, https://arxiv.org/abs/2303.09833): :meth:`dps` with recurrence."""
        return cls(rho=rho, mu=0.0, iterations=0, recurrence=recurrence, rho_schedule="constant")

    @classmethod
    def ugd(cls, mu: float = 1.0, *, rho: float = 0.0, iterations: int = 4, recurrence: int = 4) -> Self:
        """Universal guidance (Bansal et al., 2023, https://arxiv.org/abs/2302.07121): steps on x0 with recurrence.

        ``mu`` is the size of its backward guidance, ``rho`` that of its forward guidance.
        """
        return cls(
            rho=rho,
            mu=mu,
            iterations=iterations,
            recurrence=recurrence,
            rho_schedule="constant",
            mu_schedule="constant",
        )


class TFG(GuidanceRule):
    """Training-free guidance (Ye et al., NeurIPS 2024, https://arxiv.org/abs/2409.15761, algorithm 1).

    The strongest cheap rival of optimised latents. With ``z = alpha x0 + sigma e``, primes for the next noise level,
    ``a = (alpha / alpha')^2`` and ``log p = -objective(decode(x0))``, a step does ``recurrence`` times

        x0, e   of the network at z, under classifier-free guidance
        D_z     = rho_t grad_z log p(x0)                            through the network
        D_0    += mu_t grad_x0 log p(x0 + D_0)                      ``iterations`` times, without the network
        z'      = alpha' (x0 + D_0) + sigma' e + D_z / sqrt(a)
        z       ~ N(sqrt(a) z', sigma^2 - a sigma'^2)               before the next recurrence

    where ``p`` is smoothed over ``samples`` copies of x0 with noise of deviation ``smoothing_t`` on them. The rule
    returns the prediction with which a first-order solver (DDIM, Euler) steps to the last ``z'``; a multi-step solver
    takes it for what the network predicted. The result has no gradient.

    Args:
        objective: loss of images; of a list, the sum.
        settings: strengths, such as ``TFGSettings.freedom(rho=0.5, recurrence=4)``.
        guidance_scale: classifier-free guidance scale; 1 evaluates the prompt alone.

    Raises:
        UserError: if the scale is not finite.
    """

    differentiable = False

    def __init__(
        self,
        objective: Objective | list[Objective],
        settings: TFGSettings = TFGSettings(),
        guidance_scale: float = 7.5,
    ) -> None:
        if not math.isfinite(guidance_scale):
            raise UserError(f"guidance_scale of TFG must be a finite number, got {guidance_scale}")
        self.objective, self.settings, self.guidance_scale = as_objective(objective), settings, guidance_scale
        self._run: Run | None = None

    def conditionings(self, unconditional: C, prompt: C, *concepts: C) -> list[C]:
        """See :class:`GuidanceRule`; those of classifier-free guidance."""
        return self._classifier_free.conditionings(unconditional, prompt)

    def __call__(self, predictions: Sequence[Tensor], step: int) -> Tensor:
        """Classifier-free guidance alone."""
        return self._classifier_free(predictions, step)

    @property
    def _classifier_free(self) -> ClassifierFreeGuidance:
        return ClassifierFreeGuidance(self.guidance_scale)

    def begin(self, run: Run) -> None:
        """See :class:`GuidanceRule`.

        Raises:
            UserError: if two steps are at one noise level, or noise has to be drawn and there are no generators.
        """
        ratios = run.ratios
        if not (ratios[1:] < ratios[:-1]).all():
            raise UserError(
                "TFG needs a solver whose every step begins with less noise than the step before; set sampling.solver "
                "to DDIM, and invert without guidance"
            )
        if run.generators is None and (self.settings.recurrence > 1 or self.settings.smoothing):
            raise UserError(
                "TFG draws noise and was given no generators; set tfg.recurrence to 1 and tfg.smoothing to 0"
            )
        self._run = run

    def guide(self, model: Predictor, latents: Tensor, timestep: Tensor, step: int, recompute: bool = False) -> Tensor:
        """See :class:`GuidanceRule`; crops of the objective are named by the timestep.

        Raises:
            UserError: if the solver does not say which noise level comes next, or a gradient through the network is
                asked for where the latents are noise alone.
        """
        if self._run is None:
            raise UserError("TFG needs a solver that tells the next noise level; set sampling.solver to DDIM")
        run, settings = self._run, self.settings
        self.objective.to(latents.device)
        here, there = run.level(step), run.level(step + 1)
        rho = float(strengths(run.alphas, settings.rho, settings.rho_schedule)[step])
        mu = float(strengths(run.alphas, settings.mu, settings.mu_schedule)[step])
        if rho and not here.alpha:
            raise UserError(
                f"TFG's gradient through the network is infinite at timestep {int(timestep)}, where latents are noise "
                "alone; set tfg.rho to 0, or sampling.solver to one that starts later"
            )
        ratio, process, start = here.alpha / there.alpha, model.process, latents.detach()
        noisy = arrived = start
        for recurrence in range(settings.recurrence):
            if recurrence:
                deviation = math.sqrt(max(0.0, here.sigma**2 - (ratio * there.sigma) ** 2))
                noisy = ratio * arrived + deviation * run.noise(noisy)
            log_density = self._log_density(model, timestep, noisy, here.sigma)
            with torch.set_grad_enabled(rho != 0):
                noisy = noisy.detach().requires_grad_(rho != 0)
                prediction = self(model.predictions(noisy, timestep, step), step)
                clean = process.x0(noisy, prediction, timestep)
                through = rho * _gradient(log_density(clean), noisy) if rho else torch.zeros_like(noisy)
            with torch.no_grad():
                noise, clean = process.noise(noisy, prediction.detach(), timestep), clean.detach()
                climbed = climb(log_density, clean, mu, settings.iterations)
                arrived = there.alpha * climbed + there.sigma * noise
                if rho:
                    arrived = arrived + through / ratio
                noisy = noisy.detach()
        return _prediction_to(arrived, start, here, there, timestep, model)

    def _log_density(self, model: Predictor, timestep: Tensor, like: Tensor, sigma: float) -> LogDensity:
        """The smoothed density at a noise level; of the same noise for all evaluations."""

        def log_density(clean: Tensor) -> Tensor:
            losses: Tensor = self.objective(model.decode(clean), int(timestep))
            return -losses

        settings, run = self.settings, self._run
        if run is None or not settings.smoothing:
            return log_density
        scale = settings.smoothing * (sigma if settings.smoothing_schedule == "decrease" else 1.0)
        return smoothed(log_density, [scale * run.noise(like) for _ in range(settings.samples)])


def strengths(alphas: Tensor, mean: float, schedule: Schedule) -> Tensor:
    """Strength of the guidance at each of N steps.

    Proportional to ``a_t = (alpha_t / alpha_(t-1))^2``, which rises towards the image, to ``1 - a_t``, which falls, or
    to 1; scaled to the mean over the steps.

    Args:
        alphas: (N + 1,) factor of the image at the noise level of each step, and at the end.
        mean: of the strengths.
        schedule: name of the schedule.

    Returns:
        (N,) strengths.
    """
    kept = (alphas[:-1] / alphas[1:]).square()
    shape = {"increase": kept, "decrease": 1 - kept, "constant": torch.ones_like(kept)}[schedule]
    # One step from noise alone to the image: the mean is the strength.
    return mean * shape / shape.mean() if shape.any() else torch.full_like(kept, mean)


def smoothed(log_density: LogDensity, offsets: Sequence[Tensor]) -> LogDensity:
    """Logarithm of the mean of a density over copies of its argument with offsets on them.

    Args:
        log_density: the density's logarithm.
        offsets: each (B, C, h, w).
    """

    def log_mean(clean: Tensor) -> Tensor:
        values = torch.stack([log_density(clean + offset) for offset in offsets])
        return values.logsumexp(dim=0) - math.log(len(offsets))

    return log_mean


def climb(log_density: LogDensity, clean: Tensor, size: float, iterations: int) -> Tensor:
    """Gradient ascent from clean latents (B, C, h, w), without momentum.

    Args:
        log_density: what is climbed.
        clean: start.
        size: factor of the gradient.
        iterations: number of steps.

    Returns:
        (B, C, h, w) without a graph.
    """
    if not size:
        return clean
    for _ in range(iterations):
        with torch.enable_grad():
            leaf = clean.detach().requires_grad_()
            gradient = _gradient(log_density(leaf), leaf)
        clean = leaf.detach() + size * gradient
    return clean


def _gradient(values: Tensor, leaf: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return gradient


def _prediction_to(
    target: Tensor, latents: Tensor, here: Level, there: Level, timestep: Tensor, model: Predictor
) -> Tensor:
    """The prediction with which the step from here to there ends at a target.

    Its x0 and e solve ``alpha x0 + sigma e = z`` and ``alpha' x0 + sigma' e = target``.
    """
    determinant = here.alpha * there.sigma - there.alpha * here.sigma
    clean = (there.sigma * latents - here.sigma * target) / determinant
    alpha, sigma = model.process.alpha(timestep), model.process.sigma(timestep)
    return convert(clean, latents, alpha, sigma, source="x0", target=model.process.kind)
