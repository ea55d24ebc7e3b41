"""The one sampling loop, with any scheduler, any guidance rule and any number of differentiated steps."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from tokenlearn.diffusion.recomputation import recomputed
from tokenlearn.errors import UserError


class ConditioningRows(Protocol):
    """What sampling needs to know of a conditioning: a batch of rows that can be stacked."""

    @property
    def requires_grad(self) -> bool:
        """Whether any tensor in it needs a gradient."""

    def __len__(self) -> int:
        """Number of rows."""

    def expand(self, batch: int) -> Self:
        """One row repeated to ``batch`` rows."""

    @staticmethod
    def cat(conditionings: Sequence[Any]) -> Any:  # noqa: ANN401 - static methods cannot name Self
        """Rows of all conditionings, one after another."""


@runtime_checkable
class SteppedRule(Protocol):
    """A guidance rule that does not need every conditioning at every step."""

    def needed(self, step: int) -> Sequence[int]:
        """Indices of the conditionings that the rule needs the network's output for at a step, at least one."""

    def __call__(self, predictions: Sequence[Tensor], step: int) -> Tensor:
        """One output from the outputs (B, C, h, w) for these conditionings."""


C = TypeVar("C", bound=ConditioningRows)


class Scheduler(Protocol):
    """The part of diffusers' schedulers that sampling uses."""

    timesteps: Any
    init_noise_sigma: Any
    set_timesteps: Callable[..., None]
    scale_model_input: Callable[..., Any]
    step: Callable[..., Any]


def sample(
    model: Callable[[Tensor, Tensor, C], Tensor],
    scheduler: Scheduler,
    latents: Tensor,
    conditionings: Sequence[C],
    combine: Callable[[Sequence[Tensor], int], Tensor],
    num_inference_steps: int,
    gradient_steps: int | None = None,
    checkpointing: bool = True,
    detach_inputs: bool = False,
    generators: list[torch.Generator] | None = None,
    step_options: Callable[[int], Mapping[str, Any]] | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
    from_timestep: int | None = None,
    to_timestep: int | None = None,
) -> Tensor:
    """Sample latents, differentiably through the last ``gradient_steps`` steps.

    With ``gradient_steps`` K the latents before the last K steps are constants: K = 1 is the gradient skipping of
    discriminative class tokens (https://arxiv.org/abs/2303.17155), all steps is the full chain. Nothing is evaluated
    with a gradient that cannot have one: in the first of the K steps, conditionings that do not require a gradient
    (the empty prompt's) go through the network apart from the others, without a graph. Otherwise every step is one
    call of the network for the rows of all conditionings. An outer ``torch.no_grad`` is respected.

    Args:
        model: network, as (rows, C, h, w) latents, a scalar timestep and conditioning rows to (rows, C, h, w) outputs
            of the kind that the scheduler expects. It must be deterministic, because checkpointing does not restore
            random number generators.
        scheduler: a diffusers scheduler. The sampler works on a copy of it, so the history that multi-step schedulers
            keep, and the graph that hangs on it, does not outlive the call.
        latents: (B, C, h, w) standard normal noise, scaled here to the scheduler's first noise level; or latents that
            have the noise level of ``from_timestep``.
        conditionings: what the network is evaluated for, each of B rows, or of one row that all samples share.
        combine: guidance rule, from the outputs (B, C, h, w) for each conditioning and the step's index to one output.
            If it is a :class:`SteppedRule`, the network is evaluated for those conditionings alone that the rule needs
            at a step, and the rule gets their outputs.
        num_inference_steps: number of steps asked of the scheduler.
        gradient_steps: K, counted over those of ``scheduler.timesteps`` that are run; some schedulers have more than
            ``num_inference_steps`` (PNDM 1, Heun about twice as many). None is all; more than there are is all.
        checkpointing: whether to recompute the network's activations in the backward pass, one step at a time, when
            more than one step is differentiated. The scheduler's step is never recomputed, since it changes its state.
        detach_inputs: whether what goes into the network is a constant at every step, so that the gradient reaches
            conditionings through each step's output but not through the network's dependence on earlier ones (DRTune,
            https://arxiv.org/abs/2405.00760). It is biased and can replace the chain's gradient where that explodes;
            conditionings without a gradient then never need a graph, which is about half of the cost.
        generators: one per sample, for schedulers that add noise; ignored by others.
        step_options: further arguments of the scheduler's step by the step's index, such as DDIM's ``eta`` and
            ``variance_noise``.
        callback: called after every step with its index and the new latents.
        from_timestep: first of ``scheduler.timesteps`` to run, None for its own first. Steps are counted from it.
        to_timestep: last of ``scheduler.timesteps`` to run, None for its own last.

    Returns:
        (B, C, h, w) float32 latents of the images.

    Raises:
        ValueError: if ``gradient_steps`` is negative, or a conditioning has neither 1 nor B rows.
        UserError: if there is no step from ``from_timestep`` to ``to_timestep``, or the scheduler cannot start at
            ``from_timestep``.
    """
    if gradient_steps is not None and gradient_steps < 0:
        raise ValueError(f"gradient_steps must be at least 0, got {gradient_steps}")
    batch = len(latents)
    for conditioning in conditionings:
        if len(conditioning) not in (1, batch):
            raise ValueError(f"a conditioning has {len(conditioning)} rows for {batch} latents; expected 1 or {batch}")
    conditionings = [item if len(item) == batch else item.expand(batch) for item in conditionings]

    scheduler = copy.copy(scheduler)
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    timesteps = _timesteps_between(scheduler, from_timestep, to_timestep)
    num_timesteps = len(timesteps)
    differentiated = num_timesteps if gradient_steps is None else min(gradient_steps, num_timesteps)
    checkpointing = checkpointing and differentiated > 1
    takes_generator = generators is not None and "generator" in inspect.signature(scheduler.step).parameters
    common_options = {"generator": generators} if takes_generator else {}

    rule = combine if isinstance(combine, SteppedRule) else None
    latents = latents.float()
    if from_timestep is None:
        latents = latents * scheduler.init_noise_sigma
    for index, timestep in enumerate(timesteps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and index >= num_timesteps - differentiated):
            inputs = scheduler.scale_model_input(latents, timestep)
            if detach_inputs:
                inputs = inputs.detach()
            needed = conditionings if rule is None else [conditionings[i] for i in rule.needed(index)]
            output = combine(_evaluate(model, inputs, timestep, needed, checkpointing), index)
            options = common_options | dict(step_options(index) if step_options else {})
            latents = scheduler.step(output, timestep, latents, return_dict=False, **options)[0]
        if callback is not None:
            callback(index, latents)
    return latents


def _timesteps_between(scheduler: Scheduler, first: int | None, last: int | None) -> Tensor:
    """The scheduler's timesteps from ``first`` to ``last``, both included; UserError if that is not possible."""
    timesteps: Tensor = scheduler.timesteps
    if first is None and last is None:
        return timesteps
    known = timesteps.tolist()
    for wanted in (first, last):
        if wanted is not None and wanted not in known:
            near = sorted(set(known), key=lambda timestep: abs(timestep - wanted))[:2]
            raise UserError(
                f"timestep {wanted} is not one of the scheduler's {len(known)}; take {' or '.join(map(str, near))}, "
                "or another number of steps"
            )
    # Latents of sigma-scaled schedulers (Euler) have another size in the middle of the chain, and those that visit a
    # timestep twice (PNDM, Heun) cannot know which visit is meant.
    if first is not None and (float(scheduler.init_noise_sigma) != 1 or len(set(known)) < len(known)):
        raise UserError(f"{type(scheduler).__name__} cannot start at timestep {first}; use the DDIM scheduler")
    start = 0 if first is None else known.index(first)
    stop = len(known) if last is None else known.index(last) + 1
    if start >= stop:
        raise UserError(f"the scheduler has no step from timestep {first} to {last}; exchange them")
    return timesteps[start:stop]


def _evaluate(
    model: Callable[[Tensor, Tensor, C], Tensor],
    latents: Tensor,
    timestep: Tensor,
    conditionings: Sequence[C],
    checkpointing: bool,
) -> list[Tensor]:
    """Model outputs for each conditioning, rows that need a gradient in one call and the others in another."""
    needs_grad = [torch.is_grad_enabled() and (latents.requires_grad or item.requires_grad) for item in conditionings]
    outputs: dict[int, Tensor] = {}
    # What checkpointing computes again in the backward pass would come after the context.
    same_latents = nullcontext if checkpointing else getattr(model, "same_latents", nullcontext)
    with same_latents():
        for with_grad in sorted(set(needs_grad)):
            members = [index for index, needed in enumerate(needs_grad) if needed == with_grad]
            evaluate = partial(evaluate_together, model)
            own = [conditionings[index] for index in members]
            if with_grad and checkpointing:
                found = recomputed(evaluate, latents, timestep, own)
            else:
                with torch.set_grad_enabled(with_grad):
                    found = evaluate(latents, timestep, own)
            outputs |= zip(members, found, strict=True)
    return [outputs[index] for index in range(len(conditionings))]


def evaluate_together(
    model: Callable[[Tensor, Tensor, C], Tensor], latents: Tensor, timestep: Tensor, conditionings: Sequence[C]
) -> tuple[Tensor, ...]:
    """Outputs of a model for several conditionings of the same latents, in one call.

    Args:
        model: network as in :func:`sample`. If it says that it ``takes_shared_latents``, it gets the latents once.
        latents: (B, C, h, w).
        timestep: ().
        conditionings: each of B rows.

    Returns:
        An output (B, C, h, w) for each conditioning.
    """
    if not getattr(model, "takes_shared_latents", False):
        latents = torch.cat([latents] * len(conditionings))
    return model(latents, timestep, conditionings[0].cat(conditionings)).chunk(len(conditionings))
