"""What a training step of attributes costs: ``uv run python benchmarks/caso_step.py``.

Three things are measured in one run, ours in turns with each of the others so that other work on the machine hits
both alike:

``ours``
    A step of :class:`tokenlearn.methods.Caso` with the settings of a config: draw classes and noise, encode prompts,
    edit in one step, decode, classify, losses, backward, clipping and optimizer step. It runs under Lightning Fabric,
    which calls the same ``training_step`` under the same precision as the Trainer, without the Trainer's loop, loggers
    and callbacks. Constants (the empty prompt) are cached, as in training.
``floor``
    Its unavoidable parts alone, on tensors of the same shapes: the network's evaluation without gradient, that with
    gradient, VAE decoder and classifier, and the backward pass through all of them. No prompts, text encoder, noise,
    preprocessing or optimizer. Precision is that of our step, casts of autocast included.
``official``
    Our step after what the published code (https://github.com/Chang-yuanyuan/CASO) does before its own: it inverts the
    pictures by DDIM in 50 steps, one unconditional evaluation of the network each, and takes nothing from the result
    but a timestep that is always the same.

The pictures come as latents, or as pixels, which all three then encode once.

A ratio is the median over rounds of the ratio within one round. Of its numbers of attributes, a key without suffix
takes the worst for us: the largest for the floor, the smallest for the official step. Keys with a suffix
(``step_over_floor_attributes10``) give each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import islice
from statistics import median
from types import SimpleNamespace
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from lightning.fabric import Fabric

from benchmarks.common import BareParts, RowCounter, TaskStep, instantiate, parse_config, take_turns
from tokenlearn.data import ImageBatch
from tokenlearn.diffusion import invert
from tokenlearn.errors import UserError
from tokenlearn.methods import Caso
from tokenlearn.methods.base import inverse_of


class CountingFabric(Fabric):
    """Fabric that knows the number of the batch, by which :class:`Caso` names its random numbers.

    Under Fabric, a task reads Fabric's attributes for those of its trainer, and Fabric has no loop that counts.
    """

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - as Fabric's
        super().__init__(**options)
        self.fit_loop = SimpleNamespace(total_batch_idx=0)


class CasoStep(TaskStep):
    """A step of attributes, with new classes and noise each time."""

    fabric: CountingFabric

    def __call__(self) -> None:
        """Take a step on the next draws."""
        super().__call__()
        self.fabric.fit_loop.total_batch_idx += 1


class Floor(BareParts):
    """The unavoidable parts of a step, on constant tensors of the same shapes.

    Args:
        task: where network, decoder and classifier are, and the settings.
        fabric: precision.
        batch: B pictures; pixels are encoded.
    """

    def __init__(self, task: Caso, fabric: Fabric, batch: ImageBatch) -> None:
        super().__init__(task.backbone, task.classifier, fabric)
        backbone, self.scale, self.images = task.backbone, task.training_guidance_scale, batch.images
        batch_size = len(batch.names)
        self.timesteps = torch.full((batch_size,), task.timesteps[0], device=backbone.device)
        alpha, sigma = float(backbone.alphas[task.timesteps[0]]), float(backbone.sigmas[task.timesteps[0]])
        # The clean latents are a z + b noise prediction: equation 9 of https://arxiv.org/abs/2010.02502.
        self.update = 1 / alpha, -sigma / alpha
        with torch.no_grad():
            self.noisy = backbone.initial_latents(range(batch_size))
            self.empty = task.unconditional().prompt_embeds.expand(batch_size, -1, -1).clone()
            prompt = task.template.format(task.tokens[0])
            self.prompt_embeds = backbone.encode_prompts([prompt] * batch_size).prompt_embeds
        self.prompt_embeds.requires_grad_()
        self.targets = torch.zeros(batch_size, dtype=torch.long, device=backbone.device)

    def __call__(self) -> None:
        """Forward and backward."""
        self.prompt_embeds.grad = None
        with self.fabric.autocast():
            with torch.no_grad():
                if self.images is not None:
                    self.vae.encode(self.images)
                empty = self.unet(self.noisy, self.timesteps, self.empty)
            wanted = self.unet(self.noisy, self.timesteps, self.prompt_embeds)
            a, b = self.update
            loss = self.loss(a * self.noisy + b * (empty + self.scale * (wanted - empty)), self.targets)
        torch.autograd.backward(loss)


class OfficialStep:
    """Our step, with the inversion of the published code in front.

    Args:
        ours: our step.
        task: its task.
        batch: its pictures.
        num_inversion_steps: evaluations of the network.
    """

    def __init__(self, ours: CasoStep, task: Caso, batch: ImageBatch, num_inversion_steps: int) -> None:
        self.ours, self.task, self.num_inversion_steps = ours, task, num_inversion_steps
        self.inverse = inverse_of(task.scheduler)
        self.inverse.set_timesteps(num_inversion_steps)
        self.latents = task.clean_latents(batch)

    def __call__(self) -> None:
        """Invert, and take our step."""
        with self.ours.fabric.autocast(), torch.no_grad():
            empty = [self.task.unconditional()]
            invert(self.task.backbone, self.inverse, self.latents, empty, self.num_inversion_steps)
        self.ours()


def caso_step(task: Caso, fabric: CountingFabric, gradient_clip_val: float | None) -> CasoStep:
    """A step of the task with its own optimizer and clipping.

    Args:
        task: the task.
        fabric: precision and device.
        gradient_clip_val: as the Trainer's.

    Raises:
        UserError: if the task inverts the pictures itself.
    """
    if task.noising != "forward":
        raise UserError(f"noising '{task.noising}' evaluates the network more often; the floor is for 'forward'")
    configured = task.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    clip = partial(task.configure_gradient_clipping, optimizer, gradient_clip_val, "norm")
    return CasoStep(task, optimizer, fabric, clip if gradient_clip_val else None)


def random_pictures(task: Caso, batch_size: int, form: Literal["latents", "pixels"]) -> ImageBatch:
    """Noise in place of pictures, which costs the same, on the device of the task."""
    side = task.backbone.latent_size * task.backbone.vae_scale_factor
    images = torch.rand(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0)).to(task.device)
    batch = ImageBatch(images, None, {}, [str(index) for index in range(batch_size)])
    return batch if form == "pixels" else batch._replace(images=None, latents=task.clean_latents(batch))


def main(
    fit_config: str = "configs/portraits/caso.yaml",
    num_attributes: tuple[int, ...] = (1, 10),
    batch_size: int = 16,
    pictures: Literal["latents", "pixels"] = "latents",
    num_inversion_steps: int = 50,
    repetitions: int = 5,
    pairs: int = 25,
    threads: int | None = None,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    accelerator: str = "auto",
) -> None:
    """Measure, print a table, and as the last line the ratios as JSON.

    Args:
        fit_config: config of a training with :class:`Caso`.
        num_attributes: how many of the config's attributes are learned at once, counted from the first.
        batch_size: images per step.
        pictures: what the step gets.
        num_inversion_steps: steps of the published code's inversion.
        repetitions: rounds of our step and the published code's.
        pairs: rounds of our step and the floor, which are short and near to each other, so they take more.
        threads: of the CPU; null for torch's own choice.
        precision: as the Trainer's.
        accelerator: as the Trainer's.

    Raises:
        UserError: if the config has fewer attributes, or inverts the pictures itself.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    settings = parse_config(fit_config)
    attributes = settings["model.init_args.attributes"]
    if not 1 <= min(num_attributes) <= max(num_attributes) <= len(attributes):
        raise UserError(
            f"num_attributes must be from 1 to {len(attributes)}, as in '{fit_config}', got {num_attributes}"
        )

    results: dict[str, float] = {}
    line = "{:>10}  {:<10} {:>9} {:>14} {:>12}"
    print(f"{fit_config}, {batch_size} pictures as {pictures}, {precision}, {torch.get_num_threads()} threads")
    print(line.format("attributes", "", "seconds", "rows, no grad", "rows, grad"))
    for count in num_attributes:
        chosen = dict(islice(attributes.items(), count))
        task: Caso = instantiate(settings, {"model.init_args.attributes": chosen, "model.init_args.judge": None}).model
        fabric = CountingFabric(accelerator=accelerator, devices=1, precision=precision)
        ours = caso_step(task, fabric, settings.trainer.gradient_clip_val)
        batch = random_pictures(task, batch_size, pictures)
        ours.batches = [batch]
        floor = Floor(task, fabric, batch)
        official = OfficialStep(ours, task, batch, num_inversion_steps)
        steps: dict[str, Callable[[], None]] = {"ours": ours, "floor": floor, "official": official}
        counters = [RowCounter(floor.network) for _ in steps]
        for counter, step in zip(counters, steps.values(), strict=True):
            counter.count(step)  # also warms up
        beside_floor = take_turns([ours, floor], pairs, fabric.device)
        beside_official = take_turns([ours, official], repetitions, fabric.device)
        seconds = [*map(median, zip(*beside_floor, strict=True)), median(turn[1] for turn in beside_official)]
        for name, rows, own in zip(steps, counters, seconds, strict=True):
            print(line.format(count, name, f"{own:.4f}", rows.without_gradient, rows.with_gradient))
        results[f"step_over_floor_attributes{count}"] = median(turn[0] / turn[1] for turn in beside_floor)
        results[f"official_over_ours_attributes{count}"] = median(turn[1] / turn[0] for turn in beside_official)

    def of_all(key: str) -> list[float]:
        return [results[f"{key}_attributes{count}"] for count in num_attributes]

    summary = {
        "step_over_floor": max(of_all("step_over_floor")),
        "official_over_ours": min(of_all("official_over_ours")),
    }
    print(json.dumps({key: round(value, 4) for key, value in (summary | results).items()}))


if __name__ == "__main__":
    auto_cli(main)
