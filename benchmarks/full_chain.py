"""Cost of a gradient through all sampling steps: ``uv run python benchmarks/full_chain.py``.

The gradient of a loss of the sampled latents by the initial latents and by the prompt's embeddings, under
classifier-free guidance, is made in five ways, in turns so that other work on the machine affects all alike:

``autograd``
    DDIM with every activation stored (``Stored``).
``checkpointed``
    DDIM with every step recomputed in the backward pass (``Checkpointed``).
``EDICT``, ``leapfrog``, ``O-BELM``
    Reversible solvers, which store their last state alone (``Reversible``).

EDICT evaluates the network twice a step; its published use for gradients, DOODL
(https://github.com/salesforce/DOODL), evaluates it as often. The decoder and the loss of a real objective cost the
same in all ways, so they are left out.

Rows are the rows of all prompts that the network is evaluated for, without gradient and with; rows that the backward
pass evaluates again count again. The error is the relative distance of the gradient from the gradient of the same
solver with every activation stored: the effect of rounding on states that a backward sweep rebuilds. Peak memory is
the most that a gradient has allocated at once, beyond the memory before it, see :mod:`benchmarks.memory`; it is
measured apart from time. A time ratio is the median over rounds of the ratio within one round; the key without suffix
takes the worst number of steps, keys with a suffix give each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from statistics import median
from typing import Literal, NamedTuple

import torch
from jsonargparse import auto_cli
from lightning.fabric import Fabric
from torch import Tensor

from benchmarks.common import RowCounter, take_turns
from benchmarks.memory import peak_bytes
from tokenlearn.diffusion import (
    EDICT,
    OBELM,
    Checkpointed,
    Gradient,
    Leapfrog,
    Reversible,
    ReversibleSolver,
    Stored,
    sample,
)
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance, GuidedModel
from tokenlearn.models import StableDiffusion

_MIB = 2**20


class Way(NamedTuple):
    """A solver and a gradient through it."""

    solver: str | ReversibleSolver
    gradient: Gradient


WAYS: Mapping[str, Way] = {
    "autograd": Way("DDIM", Stored()),
    "checkpointed": Way("DDIM", Checkpointed()),
    "EDICT": Way(EDICT(), Reversible()),
    "leapfrog": Way(Leapfrog(), Reversible()),
    "O-BELM": Way(OBELM(), Reversible()),
}


class SamplingGradient:
    """Gradient of sampled latents by the initial latents and the prompt's embeddings, again and again.

    Args:
        backbone: the model.
        fabric: precision.
        way: solver and gradient.
        steps: sampling steps.
        batch_size: images.
        prompt: prompt of all images.
        guidance_scale: classifier-free guidance scale.
    """

    def __init__(
        self,
        backbone: StableDiffusion,
        fabric: Fabric,
        way: Way,
        *,
        steps: int,
        batch_size: int,
        prompt: str,
        guidance_scale: float,
    ) -> None:
        self.fabric, self.gradient = fabric, way.gradient
        self.solver = backbone.make_solver(way.solver, steps)
        self.latents = backbone.initial_latents(range(batch_size)).requires_grad_()
        self.directions = torch.randn(self.latents.shape, generator=torch.Generator().manual_seed(0)).to(self.latents)
        with torch.no_grad():
            empty, prompted = (backbone.encode_prompts([text] * batch_size) for text in ("", prompt))
        self.prompt_embeds = prompted.prompt_embeds.requires_grad_()
        rule = ClassifierFreeGuidance(guidance_scale)
        self.model = GuidedModel(backbone, rule, rule.conditionings(empty, prompted))

    def __call__(self) -> None:
        """Forward and backward."""
        self.gradients()

    def gradients(self) -> tuple[Tensor, ...]:
        """By the initial latents (B, C, h, w) and the prompt's embeddings (B, L, D)."""
        with self.fabric.autocast():
            latents = sample(self.model, self.latents, solver=self.solver, gradient=self.gradient)
        return torch.autograd.grad((latents * self.directions).sum(), [self.latents, self.prompt_embeds])


def main(
    pipeline: str = "checkpoints/portraits",
    prompt: str = "a portrait of a wizard",
    steps: tuple[int, ...] = (10, 20, 50),
    guidance_scale: float = 7.5,
    batch_size: int = 1,
    repetitions: int = 3,
    threads: int | None = None,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    accelerator: str = "auto",
) -> None:
    """Measure, print a table, and as the last line the ratios as JSON.

    Args:
        pipeline: folder or hub id of the diffusion model.
        prompt: prompt.
        steps: numbers of sampling steps, at least two, from few to many.
        guidance_scale: classifier-free guidance; 1 evaluates the network for the prompt alone.
        batch_size: images per gradient.
        repetitions: rounds.
        threads: threads of the CPU; null for torch's choice.
        precision: precision as of the Trainer.
        accelerator: accelerator as of the Trainer.

    Raises:
        UserError: if there are fewer than two numbers of steps.
    """
    if len(steps) < 2 or list(steps) != sorted(set(steps)):
        raise UserError(f"steps must be at least two numbers from few to many, got {steps}")
    if threads is not None:
        torch.set_num_threads(threads)
    fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)
    backbone = StableDiffusion(pipeline).to(fabric.device)

    times: dict[int, list[tuple[float, ...]]] = {}
    peaks: dict[int, dict[str, int]] = {}
    errors: dict[int, dict[str, float]] = {}
    line = "{:>5}  {:<14} {:>9} {:>10} {:>14} {:>11} {:>9}"
    print(f"{pipeline}, {batch_size} images, guidance {guidance_scale:g}, {precision}, {fabric.device}")
    print(line.format("steps", "", "seconds", "peak MiB", "rows, no grad", "rows, grad", "error"))

    def gradients_by(ways: Mapping[str, Way], count: int) -> dict[str, SamplingGradient]:
        return {
            name: SamplingGradient(
                backbone,
                fabric,
                way,
                steps=count,
                batch_size=batch_size,
                prompt=prompt,
                guidance_scale=guidance_scale,
            )
            for name, way in ways.items()
        }

    for count in steps:
        gradients = gradients_by(WAYS, count)
        stored = gradients_by({name: Way(way.solver, Stored()) for name, way in WAYS.items()}, count)
        errors[count] = {name: relative_error(gradients[name], stored[name]) for name in gradients}
        counters = {name: RowCounter(backbone.unet) for name in gradients}
        for name, gradient in gradients.items():
            counters[name].count(gradient)  # also warms up
        peaks[count] = {name: peak_bytes(gradient, fabric.device) for name, gradient in gradients.items()}
        times[count] = take_turns(list(gradients.values()), repetitions, fabric.device)
        for index, (name, rows) in enumerate(counters.items()):
            seconds = f"{median(turn[index] for turn in times[count]):.3f}"
            peak = f"{peaks[count][name] / _MIB:.2f}"
            error = f"{errors[count][name]:.1e}"
            print(line.format(count, name, seconds, peak, rows.without_gradient, rows.with_gradient, error))

    names = list(peaks[steps[0]])
    default, edict = names.index("checkpointed"), names.index("EDICT")
    each = {
        f"default_over_edict_time_steps{count}": median(turn[default] / turn[edict] for turn in times[count])
        for count in steps
    }
    few, many = steps[0], steps[-1]
    memory = {f"{_key(name)}_memory_{many}_over_{few}": peaks[many][name] / peaks[few][name] for name in names}
    worst = {f"{_key(name)}_error": max(errors[count][name] for count in steps) for name in names}
    results = {"default_over_edict_time": max(each.values())} | memory | each | worst
    print(json.dumps({key: float(f"{value:.4g}") for key, value in results.items()}))


def relative_error(gradient: SamplingGradient, exact: SamplingGradient) -> float:
    """Distance of a gradient from another in units of the latter's norm; the worse of latents and prompt."""
    pairs = zip(gradient.gradients(), exact.gradients(), strict=True)
    return max(float((found - true).norm() / true.norm()) for found, true in pairs)


def _key(name: str) -> str:
    return name.lower().replace("-", "_")


if __name__ == "__main__":
    auto_cli(main)
