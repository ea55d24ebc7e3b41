"""What a gradient through a whole sampling chain costs: ``uv run python benchmarks/full_chain.py``.

The gradient of a loss of the sampled latents by the initial latents and by the prompt's embeddings, under
classifier-free guidance, is made in five ways, in turns so that other work on the machine hits all alike:

``autograd``
    DDIM with every activation stored.
``checkpointed``
    DDIM with every step recomputed in the backward pass, as :func:`tokenlearn.diffusion.sample` does by default.
``EDICT``, ``leapfrog``, ``O-BELM``
    Invertible chains by :func:`tokenlearn.diffusion.reversible.sample_reversible`, which store their end alone.

EDICT evaluates the network twice a step; its published use for gradients, DOODL
(https://github.com/salesforce/DOODL), evaluates it as often as ours does. The decoder and the loss of a real objective
cost the same after any chain and are left out.

Rows are those that the network is evaluated for, without gradient and with; both count rows of every prompt, and
those that the backward pass evaluates again. The error is the relative distance of the gradient from that of the same
chain with every activation stored: what rounding does to the states that a backward sweep rebuilds. Peak memory is
what a gradient has allocated at once beyond what is there before it, as
:func:`benchmarks.class_token_step.peak_bytes` measures it, apart from time. A time ratio is the median over rounds of
the ratio within one round; the key without suffix takes the worst number of steps, those with a suffix give each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import median
from typing import Literal

import torch
from jsonargparse import auto_cli
from lightning.fabric import Fabric
from torch import Tensor

from benchmarks.memory import peak_bytes
from benchmarks.common import RowCounter, take_turns
from tokenlearn.diffusion import sample
from tokenlearn.diffusion.reversible import sample_reversible
from tokenlearn.diffusion.reversible_solvers import AsynchronousLeapfrog, Edict, OBelm, ReversibleSolver, leading_grid
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance
from tokenlearn.models import StableDiffusion

SOLVERS: dict[str, ReversibleSolver] = {"EDICT": Edict(), "leapfrog": AsynchronousLeapfrog(), "O-BELM": OBelm()}
_MIB = 2**20


class ChainGradient:
    """Gradient of sampled latents by the initial latents and the prompt's embeddings, again and again.

    Args:
        backbone: where the network is.
        fabric: precision.
        batch_size: images.
        prompt: prompt of all images.
        guidance_scale: classifier-free guidance.
        chain: from initial latents, conditionings and guidance to sampled latents.
    """

    def __init__(
        self,
        backbone: StableDiffusion,
        fabric: Fabric,
        batch_size: int,
        prompt: str,
        guidance_scale: float,
        chain: Callable[..., Tensor],
    ) -> None:
        self.fabric, self.chain, self.guidance = fabric, chain, ClassifierFreeGuidance(guidance_scale)
        self.latents = backbone.initial_latents(range(batch_size)).requires_grad_()
        self.directions = torch.randn(self.latents.shape, generator=torch.Generator().manual_seed(0)).to(self.latents)
        with torch.no_grad():
            self.empty, self.wanted = (backbone.encode_prompts([text] * batch_size) for text in ("", prompt))
        self.wanted.prompt_embeds.requires_grad_()

    def __call__(self) -> None:
        """Forward and backward."""
        self.gradients()

    def gradients(self) -> tuple[Tensor, ...]:
        """By the initial latents (B, C, h, w) and the prompt's embeddings (B, L, D)."""
        with self.fabric.autocast():
            conditionings = self.guidance.conditionings(self.empty, self.wanted)
            latents = self.chain(self.latents, conditionings, self.guidance)
        leaves = [self.latents, self.wanted.prompt_embeds]
        return torch.autograd.grad((latents * self.directions).sum(), leaves)


def chains(
    backbone: StableDiffusion, steps: int, stores_activations: bool = False
) -> dict[str, Callable[..., Tensor]]:
    """The five chains by name, each as :class:`ChainGradient` takes it.

    Args:
        backbone: where the network is.
        steps: sampling steps.
        stores_activations: whether all chains store every activation, as ``autograd`` always does.
    """
    scheduler = backbone.make_scheduler("DDIM", steps)
    config = scheduler.config
    grid = leading_grid(backbone.alphas, backbone.sigmas, steps, config.steps_offset, config.set_alpha_to_one)

    def ddim(checkpointing: bool) -> Callable[..., Tensor]:
        return lambda latents, conditionings, guidance: sample(
            backbone, scheduler, latents, conditionings, guidance, steps, checkpointing=checkpointing
        )

    def reversible(solver: ReversibleSolver) -> Callable[..., Tensor]:
        return lambda latents, conditionings, guidance: sample_reversible(
            backbone.predict_noise, grid, latents, conditionings, guidance, solver, not stores_activations
        )

    invertible = {name: reversible(solver) for name, solver in SOLVERS.items()}
    return {"autograd": ddim(checkpointing=False), "checkpointed": ddim(not stores_activations)} | invertible


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
        threads: of the CPU; null for torch's own choice.
        precision: as the Trainer's.
        accelerator: as the Trainer's.

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

    def gradients_of(named: dict[str, Callable[..., Tensor]]) -> dict[str, ChainGradient]:
        return {
            name: ChainGradient(backbone, fabric, batch_size, prompt, guidance_scale, chain)
            for name, chain in named.items()
        }

    for count in steps:
        gradients = gradients_of(chains(backbone, count))
        stored = gradients_of(chains(backbone, count, stores_activations=True))
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


def relative_error(gradient: ChainGradient, exact: ChainGradient) -> float:
    """Distance of a gradient from another in units of the latter's norm; the worse of latents and prompt."""
    pairs = zip(gradient.gradients(), exact.gradients(), strict=True)
    return max(float((found - true).norm() / true.norm()) for found, true in pairs)


def _key(name: str) -> str:
    return name.lower().replace("-", "_")


if __name__ == "__main__":
    auto_cli(main)
