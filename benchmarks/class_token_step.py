"""Cost of a training step of class tokens: ``uv run python benchmarks/class_token_step.py``.

Three steps are measured in one run, in turns, so that other work on the machine affects all of them:

``ours``
    A step of :class:`tokenlearn.training.ClassTokens` on new prompts and seeds: encode prompts, make noise, sample,
    decode, classify, loss, backward and AdamW step. It runs under Lightning Fabric, which calls the same
    ``training_step`` under the same precision as the Trainer, without the Trainer's loop, loggers and callbacks.
    Constants (the empty prompt) are cached, as in training.
``floor``
    Its unavoidable parts alone, on tensors of the same shapes: the network's evaluations without gradient, the last K
    with gradient, VAE decoder and classifier, and the backward pass through all of them. There are no prompts, text
    encoder, noise, preprocessing or optimizer. The precision is the same as in our step, with the casts of autocast.
``whole table``
    Our step with the optimizer of the published code (https://github.com/idansc/discriminative_class_tokens): the text
    encoder's whole input embedding, with one more row per token, is the parameter. The gradient of the other rows is
    zeroed, and AdamW with weight decay has a state for all rows.

A ratio is the median over rounds of the ratio within one round. A key without suffix is the least favourable of the
batch sizes: the largest ratio over the floor, the smallest ratio of the whole table. Keys with a suffix
(``step_over_floor_batch8``) give each batch size.

Peak memory is the most that a step has allocated at once beyond the weights and the state of the optimizer: on the CPU
from the allocations that torch's profiler records, on CUDA from the peak of the allocator. Both count tensors exactly
and repeatably, where the resident size of a process depends on the history of the heap. Scratch buffers that libraries
allocate without torch are not counted. Memory and time are measured apart.

The table of the bundled model is small, so the whole-table optimizer is also measured for a table of CLIP's size: a
dense gradient, zeroing it and the AdamW step, without a model.
"""

from __future__ import annotations

import json
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
from tokenlearn.diffusion import LastK
from tokenlearn.errors import UserError
from tokenlearn.metrics import timed
from tokenlearn.models import StableDiffusion
from tokenlearn.objectives import ClassifierLoss
from tokenlearn.pipeline import Sampling
from tokenlearn.training import ClassTokens

CLIP_TABLE = (49408, 768)
TEMPLATES = ("a portrait of a {}", "a photo of a {}", "a picture of a {}")
_MIB = 2**20


class Step(Protocol):
    """A training step that can be repeated."""

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
        task: class tokens by a classifier, with classifier-free guidance.
        fabric: precision.
        batch_size: B.
    """

    optimizer: Optimizer | None = None

    def __init__(self, task: ClassTokens, fabric: Fabric, batch_size: int) -> None:
        super().__init__(task.backbone, cast(ClassifierLoss, task.objective).classifier, fabric)
        backbone, self.scale = task.backbone, cast(float, task.sampling.guidance)
        scheduler = backbone.make_scheduler()
        scheduler.set_timesteps(task.sampling.steps, device=backbone.device)
        self.timesteps = list(scheduler.timesteps)
        differentiated = task.gradient.num_steps(len(self.timesteps))
        self.first = len(self.timesteps) - differentiated
        self.checkpointing = task.gradient.checkpointing and differentiated > 1

        # DDIM as latents <- a latents + b noise prediction: equations 12 and 13 of https://arxiv.org/abs/2010.02502.
        indices = [int(timestep) for timestep in self.timesteps]
        levels = torch.arange(backbone.process.num_timesteps, device=backbone.device)
        alphas, sigmas = backbone.process.alpha(levels).tolist(), backbone.process.sigma(levels).tolist()
        self.updates = [
            (alphas[after] / alphas[before], sigmas[after] - alphas[after] * sigmas[before] / alphas[before])
            for before, after in zip(indices, [*indices[1:], 0], strict=True)
        ]

        with torch.no_grad():
            self.noise = backbone.initial_latents(range(batch_size))
            self.empty = task.pipeline.unconditional().prompt_embeds.expand(batch_size, -1, -1).clone()
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
                        empty, prompt = self.unet(torch.cat([latents] * 2), timestep, self.constants).chunk(2)
                elif index == self.first:
                    with torch.no_grad():
                        empty = self.unet(latents, timestep, self.empty)
                    prompt = self._unet_with_gradient(latents, timestep, self.prompt_embeds)
                else:
                    embeds = torch.cat([self.empty, self.prompt_embeds])
                    empty, prompt = self._unet_with_gradient(torch.cat([latents] * 2), timestep, embeds).chunk(2)
                latents = a * latents + b * (empty + self.scale * (prompt - empty))
            loss = self.loss(latents, self.targets)
        torch.autograd.backward(loss)

    def _unet_with_gradient(self, latents: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
        if not self.checkpointing:
            return self.unet(latents, timestep, embeds)
        return checkpoint(self.unet, latents, timestep, embeds, use_reentrant=False, preserve_rng_state=False)


def whole_table_step(task: ClassTokens, fabric: Fabric) -> PromptStep:
    """A step of the task with the whole input embedding as the parameter.

    Args:
        task: the task, whose text encoder is changed.
        fabric: precision and device.
    """
    backbone: Any = task.backbone
    encoder: Any = backbone.text_encoders[0]
    assert task.bank is not None
    vectors = task.bank.vectors[0].detach()
    words = encoder.get_input_embeddings().weight.detach()
    rows = torch.cat([words, vectors.to(words)])
    table = nn.Embedding(len(rows), rows.shape[1], _weight=rows)
    encoder.set_input_embeddings(table)

    def run_text_encoder(ids: Tensor, tokens: object, encoder_index: int = 0, **options: Any) -> Any:  # noqa: ANN401
        """Read placeholders from the table: the tokenizer numbers them from the last word on."""
        ids = ids.to(backbone.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool((ids >= len(words)).any())):
            return encoder(ids, **options)

    backbone.run_text_encoder = run_text_encoder
    optimizer = AdamW(table.parameters(), lr=2e-2, weight_decay=1e-2)
    return PromptStep(task, optimizer, fabric, lambda: _zero_other_rows(table.weight, len(words)))


def _zero_other_rows(table: Tensor, num_words: int) -> None:
    """Zero the gradient of words as the published code does, by a mask of rows."""
    assert table.grad is not None
    table.grad[torch.arange(len(table), device=table.device) < num_words] = 0


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the state of an optimizer."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def clip_table_optimizer(num_tokens: int, repetitions: int, device: torch.device) -> tuple[float, int]:
    """Median seconds and state bytes of the whole-table optimizer without a model, for a table of CLIP's size."""
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

    Args:
        pipeline: folder or hub id of a Stable Diffusion.
        classifier: folder or timm name of the classifier.
        classes: classes of the classifier, one token each.
        steps: sampling steps.
        gradient_steps: differentiated steps, K.
        guidance_scale: classifier-free guidance, not 1.
        checkpointing: recompute each differentiated step in the backward pass.
        batch_sizes: images per step.
        repetitions: rounds.
        precision: precision, as in the Trainer's settings.
        accelerator: accelerator, as in the Trainer's settings.
    """
    if guidance_scale == 1:
        raise UserError("guidance_scale 1 needs no unconditional prediction, but the floor has one; set another scale")
    fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)

    def task() -> ClassTokens:
        return ClassTokens(
            StableDiffusion(pipeline),
            list(classes),
            ClassifierLoss(classifier),
            sampling=Sampling(steps=steps, guidance=guidance_scale),
            gradient=LastK(gradient_steps, checkpointing),
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
            state = "" if step.optimizer is None else f"{state_bytes(step.optimizer) / 1024:.1f}"
            counts = (rows.without_gradient, rows.with_gradient)
            print(line.format(batch_size, name, step_seconds, f"{peak / _MIB:.2f}", *counts, state))
        results[f"step_over_floor_batch{batch_size}"] = median(turn[0] / turn[1] for turn in rounds)
        results[f"memory_over_floor_batch{batch_size}"] = peaks[0] / peaks[1]
        results[f"whole_table_over_ours_batch{batch_size}"] = median(turn[2] / turn[0] for turn in rounds)
    seconds, state_size = clip_table_optimizer(len(classes), repetitions, device)
    size = "x".join(map(str, CLIP_TABLE))
    print(f"whole-table optimizer alone on a table of {size}: {seconds:.4f} s, state {state_size / _MIB:.1f} MiB")
    results["clip_table_optimizer_seconds"] = seconds

    def per_batch_size(key: str) -> list[float]:
        return [results[f"{key}_batch{batch_size}"] for batch_size in batch_sizes]

    summary = {
        "step_over_floor": max(per_batch_size("step_over_floor")),
        "memory_over_floor": max(per_batch_size("memory_over_floor")),
        "whole_table_over_ours": min(per_batch_size("whole_table_over_ours")),
    }
    print(json.dumps({key: round(value, 4) for key, value in (summary | results).items()}))


if __name__ == "__main__":
    auto_cli(main)
