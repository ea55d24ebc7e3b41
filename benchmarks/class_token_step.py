"""What a training step of class tokens costs: ``uv run python benchmarks/class_token_step.py``.

Three things are measured in one run, in turns so that other work on the machine hits all alike:

``ours``
    A step of :class:`tokenlearn.methods.ClassTokens` on new prompts and seeds: encode prompts, draw noise, sample,
    decode, classify, loss, backward and AdamW step. It runs under Lightning Fabric, which calls the same
    ``training_step`` under the same precision as the Trainer, without the Trainer's loop, loggers and callbacks.
    Constants (the empty prompt) are cached, as in training.
``floor``
    Its unavoidable parts alone, on tensors of the same shapes: the network's evaluations without gradient, the last K
    with gradient, VAE decoder and classifier, and the backward pass through all of them. No prompts, text encoder,
    noise, preprocessing or optimizer. Precision is that of our step, casts of autocast included.
``whole table``
    Our step, but with the optimizer of the published code (https://github.com/idansc/discriminative_class_tokens): the
    text encoder's whole input embedding, with a row more per token, is the parameter; the gradient of the other rows
    is zeroed, and AdamW with weight decay keeps its state for all rows.

A ratio is the median over rounds of the ratio within one round. Of its batch sizes, a key without suffix takes the
worst for us: the largest for the two over the floor, the smallest for the whole table's. Keys with a suffix
(``step_over_floor_batch8``) give each batch size.

Peak memory is what a step has allocated at once beyond what is there before it (weights, optimizer state), from the
allocations that torch's profiler records on the CPU, and from the allocator's own peak on CUDA. Both count tensors
exactly and repeatably, where a process's resident size depends on the heap's history. Scratch buffers that libraries
allocate past torch's allocator are not counted. It is measured apart from time.

The bundled model's table is small, so the cost of the whole-table optimizer is also measured for a table of CLIP's
size, alone: a dense gradient, zeroing it and the AdamW step, without a model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from statistics import median
from typing import Any, Literal, Protocol, cast

import torch
from jsonargparse import auto_cli
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from benchmarks.common import BareParts, RowCounter, TaskStep, take_turns
from benchmarks.memory import peak_bytes
from tokenlearn.data.prompts import prompt_stream
from tokenlearn.errors import UserError
from tokenlearn.methods import ClassTokens
from tokenlearn.metrics import timed
from tokenlearn.models import StableDiffusion

CLIP_TABLE = (49408, 768)
TEMPLATES = ("a portrait of a {}", "a photo of a {}", "a picture of a {}")
_MIB = 2**20


class Step(Protocol):
    """One training step, again and again."""

    optimizer: Optimizer | None

    def __call__(self) -> None:
        """Take a step."""


class PromptStep(TaskStep):
    """A step of class tokens on new prompts and seeds."""

    def use_batch_size(self, batch_size: int) -> None:
        """Go on with batches of this size."""
        self.batches = prompt_stream(TEMPLATES, len(self.task.classes), batch_size=batch_size, length=1)


class Floor(BareParts):
    """The unavoidable parts of a step, on constant tensors of the same shapes.

    Args:
        task: where network, decoder and classifier are, and the settings.
        fabric: precision.
        batch_size: B.
    """

    optimizer: Optimizer | None = None

    def __init__(self, task: ClassTokens, fabric: Fabric, batch_size: int) -> None:
        super().__init__(task, fabric)
        backbone, self.scale = task.backbone, task.guidance.guidance_scale
        scheduler = copy.copy(task.scheduler)
        scheduler.set_timesteps(task.num_inference_steps, device=backbone.device)
        self.timesteps = list(scheduler.timesteps)
        self.first = max(len(self.timesteps) - task.gradient_steps, 0)
        self.checkpointing = task.checkpointing and len(self.timesteps) - self.first > 1

        # DDIM as latents <- a latents + b noise prediction: equations 12 and 13 of https://arxiv.org/abs/2010.02502.
        indices = [int(timestep) for timestep in self.timesteps]
        alphas, sigmas = backbone.alphas.tolist(), backbone.sigmas.tolist()
        self.updates = [
            (alphas[after] / alphas[before], sigmas[after] - alphas[after] * sigmas[before] / alphas[before])
            for before, after in zip(indices, [*indices[1:], 0], strict=True)
        ]

        with torch.no_grad():
            self.noise = backbone.initial_latents(range(batch_size))
            self.empty = task.unconditional().prompt_embeds.expand(batch_size, -1, -1).clone()
            prompts = [TEMPLATES[0].format(name) for name in task.class_names]
            prompts = [prompts[index % len(prompts)] for index in range(batch_size)]
            self.prompt_embeds = backbone.encode_prompts(prompts).prompt_embeds
            self.constants = torch.cat([self.empty, self.prompt_embeds])
        self.prompt_embeds.requires_grad_()
        self.targets = torch.zeros(batch_size, dtype=torch.long, device=backbone.device)

    def __call__(self) -> None:
        """Forward and backward."""
        self.prompt_embeds.grad = None
        with self.fabric.autocast():
            latents = self.noise
            for index, (timestep, (a, b)) in enumerate(zip(self.timesteps, self.updates, strict=True)):
                if index < self.first:
                    with torch.no_grad():
                        empty, wanted = self.unet(torch.cat([latents] * 2), timestep, self.constants).chunk(2)
                elif index == self.first:
                    with torch.no_grad():
                        empty = self.unet(latents, timestep, self.empty)
                    wanted = self._unet_with_gradient(latents, timestep, self.prompt_embeds)
                else:
                    embeds = torch.cat([self.empty, self.prompt_embeds])
                    empty, wanted = self._unet_with_gradient(torch.cat([latents] * 2), timestep, embeds).chunk(2)
                latents = a * latents + b * (empty + self.scale * (wanted - empty))
            loss = self.loss(latents, self.targets)
        torch.autograd.backward(loss)

    def _unet_with_gradient(self, latents: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
        if not self.checkpointing:
            return self.unet(latents, timestep, embeds)
        return checkpoint(self.unet, latents, timestep, embeds, use_reentrant=False, preserve_rng_state=False)


def whole_table_step(task: ClassTokens, fabric: Fabric) -> PromptStep:
    """A step of the task with the whole input embedding as the parameter.

    Args:
        task: the task; its text encoder is changed.
        fabric: precision and device.
    """
    encoder = cast(Any, task.backbone.text_encoders[0])
    assert task.bank is not None
    vectors = task.bank.vectors[0].detach()
    words = encoder.get_input_embeddings().weight.detach()
    rows = torch.cat([words, vectors.to(words)])
    table = nn.Embedding(len(rows), rows.shape[1], _weight=rows)
    encoder.set_input_embeddings(table)  # the tokenizer counts placeholders on from the last word
    optimizer = AdamW(table.parameters(), lr=2e-2, weight_decay=1e-2)
    return PromptStep(task, optimizer, fabric, lambda: _zero_other_rows(table.weight, len(words)))


def _zero_other_rows(table: Tensor, num_words: int) -> None:
    """Zero the gradient of words as the published code does, by a mask of rows."""
    assert table.grad is not None
    table.grad[torch.arange(len(table), device=table.device) < num_words] = 0


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors that an optimizer keeps."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def clip_table_optimizer(num_tokens: int, repetitions: int, device: torch.device) -> tuple[float, int]:
    """Median seconds and state bytes of the whole-table optimizer alone, for a table of CLIP's size."""
    num_words, width = CLIP_TABLE
    table = nn.Parameter(torch.randn(num_words + num_tokens, width, device=device))
    optimizer = AdamW([table], lr=2e-2, weight_decay=1e-2)
    ids = torch.tensor([num_words], device=device)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(functional.embedding(ids, table).sum())
        _zero_other_rows(table, num_words)
        optimizer.step()

    step()
    seconds = median(timed(step, device)[1] for _ in range(repetitions))
    return seconds, state_bytes(optimizer)


def main(
    pipeline: str = "checkpoints/portraits",
    classifier: str = "checkpoints/persona_guide",
    classes: tuple[str, ...] = ("wizard", "pirate", "astronaut"),
    steps: int = 20,
    gradient_steps: int = 8,
    guidance_scale: float = 4.0,
    checkpointing: bool = False,
    batch_sizes: tuple[int, ...] = (1, 8),
    repetitions: int = 5,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    accelerator: str = "auto",
) -> None:
    """Measure, print a table, and as the last line the ratios as JSON.

    The defaults are the settings of ``configs/portraits/class_token.yaml``.

    Args:
        pipeline: folder or hub id of the diffusion model.
        classifier: folder or timm name of the classifier.
        classes: classes of the classifier; one token for each.
        steps: sampling steps.
        gradient_steps: differentiated steps, K.
        guidance_scale: classifier-free guidance, not 1.
        checkpointing: recompute each differentiated step in the backward pass.
        batch_sizes: images per step.
        repetitions: rounds.
        precision: as the Trainer's.
        accelerator: as the Trainer's.
    """
    if guidance_scale == 1:
        raise UserError("guidance_scale 1 evaluates no unconditional branch; the floor is for guided steps")
    fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)

    def task() -> ClassTokens:
        return ClassTokens(
            StableDiffusion(pipeline),
            classifier,
            dict.fromkeys(classes),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            gradient_steps=gradient_steps,
            checkpointing=checkpointing,
        )

    our_task, table_task = task(), task()
    ours = PromptStep(our_task, cast(Optimizer, our_task.configure_optimizers()), fabric)
    whole_table = whole_table_step(table_task, fabric)
    device = fabric.device

    results: dict[str, float] = {}
    line = "{:>5}  {:<22} {:>9} {:>12} {:>14} {:>14} {:>15}"
    print(f"{pipeline}, {steps} steps, {gradient_steps} differentiated, {precision}, {device}")
    print(line.format("batch", "", "seconds", "peak MiB", "rows, no grad", "rows, grad", "optimizer KiB"))
    for batch_size in batch_sizes:
        ours.use_batch_size(batch_size)
        whole_table.use_batch_size(batch_size)
        floor = Floor(our_task, fabric, batch_size)
        measured: list[tuple[str, Step, ClassTokens]] = [
            ("ours", ours, our_task),
            ("floor", floor, our_task),
            ("whole table", whole_table, table_task),
        ]
        counters = []
        for _, step, owner in measured:
            counters.append(RowCounter(cast(StableDiffusion, owner.backbone).unet))
            counters[-1].count(step)  # also warms up
        peaks = [peak_bytes(step, device) for _, step, _ in measured]
        rounds = take_turns([step for _, step, _ in measured], repetitions, device)
        for index, ((name, step, _), rows, peak) in enumerate(zip(measured, counters, peaks, strict=True)):
            step_seconds = f"{median(turn[index] for turn in rounds):.4f}"
            kept = "" if step.optimizer is None else f"{state_bytes(step.optimizer) / 1024:.1f}"
            counts = (rows.without_gradient, rows.with_gradient)
            print(line.format(batch_size, name, step_seconds, f"{peak / _MIB:.2f}", *counts, kept))
        results[f"step_over_floor_batch{batch_size}"] = median(turn[0] / turn[1] for turn in rounds)
        results[f"memory_over_floor_batch{batch_size}"] = peaks[0] / peaks[1]
        results[f"whole_table_over_ours_batch{batch_size}"] = median(turn[2] / turn[0] for turn in rounds)
    seconds, state = clip_table_optimizer(len(classes), repetitions, device)
    size = "x".join(map(str, CLIP_TABLE))
    print(f"whole-table optimizer alone on a table of {size}: {seconds:.4f} s, state {state / _MIB:.1f} MiB")
    results["clip_table_optimizer_seconds"] = seconds

    def of_all(key: str) -> list[float]:
        return [results[f"{key}_batch{batch_size}"] for batch_size in batch_sizes]

    summary = {
        "step_over_floor": max(of_all("step_over_floor")),
        "memory_over_floor": max(of_all("memory_over_floor")),
        "whole_table_over_ours": min(of_all("whole_table_over_ours")),
    }
    print(json.dumps({key: round(value, 4) for key, value in (summary | results).items()}))


if __name__ == "__main__":
    auto_cli(main)
