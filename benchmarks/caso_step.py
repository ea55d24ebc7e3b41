"""Cost of a training step of attributes: ``uv run python benchmarks/caso_step.py``.

Three steps are measured in one run, ours in turns with each of the others, so that other work on the machine affects
all of them:

``ours``
    A step of :class:`tokenlearn.training.Caso` with the settings of a config: choose classes and noise, encode
    prompts, edit in one step, decode, classify, losses, backward, clipping and optimizer step. It runs under Lightning
    Fabric, which calls the same ``training_step`` under the same precision as the Trainer, without the Trainer's loop,
    loggers and callbacks. Constants (the empty prompt) are cached, as in training.
``floor``
    Its unavoidable parts alone, on tensors of the same shapes: the network's evaluation without gradient, the one with
    gradient, VAE decoder and classifier, and the backward pass through all of them. There are no prompts, text
    encoder, noise, preprocessing or optimizer. The precision is the same as in our step, with the casts of autocast.
``official``
    Our step after the first part of the published code's step (https://github.com/Chang-yuanyuan/CASO): the published
    code inverts the images by DDIM in 50 steps, one unconditional evaluation of the network each, and takes from the
    result only a timestep that is always the same.

The images are given as latents, or as pixels, which all three then encode once.

A ratio is the median over rounds of the ratio within one round. A key without suffix is the least favourable of the
numbers of attributes: the largest ratio over the floor, the smallest ratio of the official step. Keys with a suffix
(``step_over_floor_attributes10``) give each number.
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
from tokenlearn.data.batches import ImageBatch
from tokenlearn.diffusion import invert
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance
from tokenlearn.training import Caso


class CountingFabric(Fabric):
    """Fabric that knows the number of the batch, which seeds the random numbers of :class:`Caso`.

    Under Fabric, a task reads Fabric's attributes in place of its trainer's, and Fabric has no loop that counts.
    """

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - as Fabric's
        super().__init__(**options)
        self.fit_loop = SimpleNamespace(total_batch_idx=0)


class CasoStep(TaskStep):
    """A step of attributes, with new classes and noise each time."""

    fabric: CountingFabric

    def __call__(self) -> None:
        """Take a step at the next position of the training."""
        super().__call__()
        self.fabric.fit_loop.total_batch_idx += 1


class Floor(BareParts):
    """The unavoidable parts of a step, on constant tensors of the same shapes.

    Args:
        task: task whose settings and models are used.
        fabric: precision.
        batch: B images; pixels are encoded.
    """

    def __init__(self, task: Caso, fabric: Fabric, batch: ImageBatch) -> None:
        super().__init__(task.backbone, task.classifier, fabric)
        backbone, self.images, timestep = task.backbone, batch.images, task.editor.timesteps[0]
        rule = task.edit.rule
        assert isinstance(rule, ClassifierFreeGuidance)
        self.scale = rule.guidance_scale
        batch_size = len(batch.names)
        self.timesteps = torch.full((batch_size,), timestep, device=backbone.device)
        alpha, sigma = (
            float(factor(self.timesteps[0])) for factor in (backbone.process.alpha, backbone.process.sigma)
        )
        # The clean latents are a z + b noise prediction: equation 9 of https://arxiv.org/abs/2010.02502.
        self.update = 1 / alpha, -sigma / alpha
        with torch.no_grad():
            self.noisy = backbone.initial_latents(range(batch_size))
            self.empty = task.pipeline.unconditional().prompt_embeds.expand(batch_size, -1, -1).clone()
            prompts = [task.prompt(task.placeholders[0])] * batch_size
            self.prompt_embeds = task.pipeline.encode(prompts).prompt_embeds
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
            prompted = self.unet(self.noisy, self.timesteps, self.prompt_embeds)
            a, b = self.update
            loss = self.loss(a * self.noisy + b * (empty + self.scale * (prompted - empty)), self.targets)
        torch.autograd.backward(loss)


class OfficialStep:
    """Our step, with the inversion of the published code in front.

    Args:
        ours: our step.
        task: its task.
        batch: its images.
        num_inversion_steps: evaluations of the network.
    """

    def __init__(self, ours: CasoStep, task: Caso, batch: ImageBatch, num_inversion_steps: int) -> None:
        self.ours, self.task = ours, task
        self.inverse = task.backbone.make_inverse_solver(num_inversion_steps)
        self.latents = task.clean_latents(batch)

    def __call__(self) -> None:
        """Invert, and take our step."""
        pipeline = self.task.pipeline
        with self.ours.fabric.autocast(), torch.no_grad():
            unguided = pipeline.guided_model(pipeline.unconditional(), ClassifierFreeGuidance(1.0))
            invert(unguided, self.latents, solver=self.inverse)
        self.ours()


def caso_step(task: Caso, fabric: CountingFabric, gradient_clip_val: float | None) -> CasoStep:
    """A step of the task with an optimizer and clipping.

    Args:
        task: the task.
        fabric: precision and device.
        gradient_clip_val: as the Trainer's.

    Raises:
        UserError: if the task evaluates the network more often than the floor.
    """
    if task.edit.noising != "forward" or task.edit.gradient is not None:
        raise UserError(
            f"edit.noising {task.edit.noising} and edit.gradient {task.edit.gradient} evaluate the network more often "
            "than the floor; set them to forward and null"
        )
    configured = task.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    clip = partial(task.configure_gradient_clipping, optimizer, gradient_clip_val, "norm")
    return CasoStep(task, optimizer, fabric, clip if gradient_clip_val else None)


def random_images(task: Caso, batch_size: int, form: Literal["latents", "pixels"]) -> ImageBatch:
    """Noise in place of images, which costs the same, on the device of the task."""
    images = torch.rand(batch_size, 3, task.image_size, task.image_size, generator=torch.Generator().manual_seed(0))
    batch = ImageBatch(images.to(task.device), None, {}, [str(index) for index in range(batch_size)])
    return batch if form == "pixels" else batch._replace(images=None, latents=task.clean_latents(batch))


def main(
    fit_config: str = "configs/portraits/caso.yaml",
    num_attributes: tuple[int, ...] = (1, 10),
    batch_size: int = 16,
    images: Literal["latents", "pixels"] = "latents",
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
        num_attributes: numbers of attributes to learn at once, counted from the config's first.
        batch_size: images per step.
        images: form of the images that a step gets.
        num_inversion_steps: steps of the published code's inversion.
        repetitions: rounds of our step and the published code's.
        pairs: rounds of our step and the floor, which are short and close to each other, so they need more.
        threads: threads of the CPU; null for torch's default.
        precision: as the Trainer's.
        accelerator: as the Trainer's.

    Raises:
        UserError: if the config has fewer attributes, or evaluates the network more often than the floor.
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
    print(f"{fit_config}, {batch_size} images as {images}, {precision}, {torch.get_num_threads()} threads")
    print(line.format("attributes", "", "seconds", "rows, no grad", "rows, grad"))
    for count in num_attributes:
        first = dict(islice(attributes.items(), count))
        task: Caso = instantiate(settings, {"model.init_args.attributes": first, "model.init_args.judge": None}).model
        fabric = CountingFabric(accelerator=accelerator, devices=1, precision=precision)
        ours = caso_step(task, fabric, settings.trainer.gradient_clip_val)
        batch = random_images(task, batch_size, images)
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
        for name, rows, step_seconds in zip(steps, counters, seconds, strict=True):
            print(line.format(count, name, f"{step_seconds:.4f}", rows.without_gradient, rows.with_gradient))
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
