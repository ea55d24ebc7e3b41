"""Semantic guidance as a guider of diffusers' modular pipelines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import ModularPipeline
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.modular_pipelines.modular_pipeline import BlockState
from torch import Tensor

from tokenlearn.errors import UserError
from tokenlearn.guidance import SEGA, SemanticEdit
from tokenlearn.guidance.semantic import MomentumAfter, ThresholdOver

_CONDITIONAL, _UNCONDITIONAL, _CONCEPT = "pred_cond", "pred_uncond", "pred_concept_"
_ANOTHER_LENGTH = "a photograph of a person who is standing in a wide landscape with trees and distant mountains"
"""A prompt of another length than concepts have, beside which masks and lengths show that they depend on the text."""


class _Inputs(BaseException):
    """Ends a pipeline's call where the network's inputs are ready, and carries them."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.inputs = inputs


class SemanticGuidance(BaseGuidance):
    """Semantic guidance (SEGA, https://arxiv.org/abs/2301.12247) for every modular pipeline that takes a guider.

    A guider with what :class:`tokenlearn.guidance.SEGA` computes: classifier-free guidance by the prompt plus the
    guidance of concepts. The pipeline has to encode the concepts once, by :meth:`encode`, before its first image::

        guider = SemanticGuidance([{"concept": "glasses", "scale": 8}], guidance_scale=5)
        pipe.update_components(guider=guider)
        guider.encode(pipe)
        image = pipe(prompt="a portrait of a person", output="images")[0]

    Settings are saved and loaded as JSON by ``save_pretrained`` and ``from_pretrained``; encoded concepts are not.

    Args:
        concepts: each as words, as settings of :class:`tokenlearn.guidance.SemanticEdit`, or as one of these.
        guidance_scale: classifier-free guidance scale of the prompt.
        scale: scale of the concepts that are given as words; None for the default.
        threshold_over: what thresholds are taken over: ``tensor``, or ``channel`` where predictions have channels
            after the samples; those of Flux, Qwen-Image and Flux.2 are sequences and have none.
        momentum_after: see :class:`tokenlearn.guidance.SEGA`.
        enabled: False evaluates the prompt alone, as with every guider.

    Raises:
        UserError: if there is no concept, one cannot be read, or a number is out of range.
    """

    _input_predictions: Any = [_CONDITIONAL, _UNCONDITIONAL]  # noqa: RUF012 - BaseGuidance requires a list

    def __init__(
        self,
        concepts: Sequence[str | Mapping[str, Any] | SemanticEdit],
        guidance_scale: float = 7.5,
        scale: float | None = None,
        threshold_over: ThresholdOver = "tensor",
        momentum_after: MomentumAfter = "own_warmup",
        enabled: bool = True,
    ) -> None:
        super().__init__(enabled=enabled)
        if isinstance(concepts, str | Mapping):
            raise UserError(f"the guider's concepts {concepts!r} are not a list; write them like ['glasses']")
        edits = [_edit(concept) for concept in concepts]
        self.guidance_scale = guidance_scale
        self._rule = SEGA(edits, guidance_scale, scale, threshold_over, momentum_after=momentum_after).fresh()
        self._encoded: list[dict[str, Any]] | None = None
        self._capturing = False
        self.register_to_config(  # type: ignore[no-untyped-call]
            concepts=[dataclasses.asdict(edit) for edit in self._rule.edits],
            guidance_scale=guidance_scale,
            scale=None,  # the settings of all concepts are complete
            threshold_over=threshold_over,
            momentum_after=momentum_after,
            enabled=enabled,
        )

    def encode(self, pipe: ModularPipeline, **arguments: Any) -> None:  # noqa: ANN401 - whatever the pipeline takes
        """Let a pipeline encode the concepts as it encodes prompts, learned tokens in them included.

        The pipeline runs up to its first denoising step for each concept and is stopped there. To be called again
        after the pipeline has other text encoders, tokens or LoRA weights.

        Args:
            pipe: a modular pipeline that has this guider.
            arguments: further arguments of its call that change how it encodes a prompt, such as ``clip_skip``, or
                that it cannot do without, such as an image to start from.

        Raises:
            UserError: if the pipeline has another guider, or never asks its guider.
        """
        if getattr(pipe, "guider", None) is not self:
            raise UserError(
                f"the pipeline's guider is {type(getattr(pipe, 'guider', None)).__name__}, not this one; call "
                "pipe.update_components(guider=guider) before guider.encode(pipe)"
            )
        other = self._inputs(pipe, _ANOTHER_LENGTH, arguments)
        captured = [self._inputs(pipe, prompt, arguments) for prompt in self._rule.concept_prompts]
        self._encoded = [
            {name: value for name, value in inputs.items() if not _equal(value, other.get(name))}
            for inputs in captured
        ]

    def prepare_inputs(self, data: Any) -> list[BlockState]:  # noqa: ANN401 - typed in diffusers as another thing
        """The network's inputs for each prediction that the step needs, from those of prompt and negative prompt.

        Args:
            data: by the name of an input, its value for all predictions, or for the prompt and the negative prompt.

        Raises:
            UserError: if the concepts are not encoded, or there is no negative prompt.
        """
        return self._batches(lambda index, name: self._prepare_batch(data, index, name))

    def prepare_inputs_from_block_state(
        self, data: BlockState, input_fields: dict[str, str | tuple[str, str]]
    ) -> list[BlockState]:
        """As :meth:`prepare_inputs`, from the names of values in a pipeline's state.

        Args:
            data: state of the pipeline.
            input_fields: by the name of an input, the name of its value, or those for prompt and negative prompt.

        Raises:
            UserError: if the concepts are not encoded, or there is no negative prompt.
        """
        return self._batches(lambda index, name: self._prepare_batch_from_block_state(input_fields, data, index, name))

    def __call__(self, data: list[Any]) -> GuiderOutput:
        """The guided prediction, from the ``noise_pred`` that the pipeline put into each of the prepared inputs."""
        return self.forward(**{getattr(batch, self._identifier_key): batch.noise_pred for batch in data})

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None, **concepts: Tensor) -> GuiderOutput:
        """The guided prediction.

        Args:
            pred_cond: prediction (B, ...) for the prompt.
            pred_uncond: prediction for the negative prompt; None where the step needs the prompt alone.
            concepts: predictions for the terms of concepts, in their order.

        Raises:
            UserError: if thresholds are taken over channels and the prediction has none.
        """
        if pred_uncond is None:
            pred = pred_cond if not self._enabled else self._rule([pred_cond], self._step)
            return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=None)
        if self._rule.threshold_over == "channel" and pred_cond.ndim < 4:
            raise UserError(
                f"predictions of shape {tuple(pred_cond.shape)} have no channels; set threshold_over to 'tensor'"
            )
        pred = self._rule([pred_uncond, pred_cond, *concepts.values()], self._step)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        """Whether the prediction that is being made is not that for the negative prompt, which is the second."""
        return self._count_prepared != 2

    @property
    def num_conditions(self) -> int:
        """Predictions of a step that needs all: prompt, negative prompt and the terms of concepts."""
        return 2 + len(self._rule.concept_prompts) if self._enabled else 1

    def _batches(self, prepare: Callable[[int, str], BlockState]) -> list[BlockState]:
        conditional = prepare(0, _CONDITIONAL)
        if self._capturing:
            raise _Inputs(conditional.as_dict())  # type: ignore[no-untyped-call]
        if not self._enabled:
            return [conditional]
        if self._step == 0:
            self._rule.check_steps(self._num_inference_steps)
        needed = self._rule.needed(self._step)
        if 0 not in needed:
            return [conditional]
        if self._encoded is None:
            raise UserError("the guider's concepts are not encoded; call guider.encode(pipe) before pipe(...)")
        unconditional = prepare(1, _UNCONDITIONAL)
        self._check_negative_prompt(conditional, unconditional)
        concepts = [self._of_concept(conditional, index - 2) for index in needed if index >= 2]
        return [conditional, unconditional, *concepts]

    def _of_concept(self, conditional: BlockState, index: int) -> BlockState:
        """The inputs of the prompt with what depends on the text replaced by what a concept's term has."""
        assert self._encoded is not None
        inputs = conditional.as_dict()  # type: ignore[no-untyped-call]
        replaced = {name: _rows_as(value, inputs.get(name)) for name, value in self._encoded[index].items()}
        named = {self._identifier_key: f"{_CONCEPT}{index}"}
        return BlockState(**inputs | replaced | named)  # type: ignore[no-untyped-call]

    def _check_negative_prompt(self, conditional: BlockState, unconditional: BlockState) -> None:
        """Refuse inputs in which the negative prompt's are missing, or are the prompt's."""
        assert self._encoded is not None
        for name in {name for inputs in self._encoded for name in inputs}:
            of_prompt, of_negative = getattr(conditional, name, None), getattr(unconditional, name, None)
            if of_prompt is not None and (of_negative is None or of_negative is of_prompt):
                raise UserError(
                    f"the pipeline has no {name} of a negative prompt, from which semantic guidance measures; call it "
                    "with negative_prompt='', or with another one"
                )

    def _inputs(self, pipe: ModularPipeline, prompt: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The network's inputs, by name, that the pipeline makes of a prompt."""
        # The same noise each time, because SD3 passes latents through its guider.
        generator = torch.Generator("cpu").manual_seed(0)
        call = {"prompt": prompt, "generator": generator} | dict(arguments)
        self._capturing = True
        try:
            cast(Any, pipe)(**call)
        except _Inputs as captured:
            inputs = captured.inputs
            inputs.pop(self._identifier_key)
            return inputs
        finally:
            self._capturing = False
        raise UserError(f"{type(pipe).__name__} made an image without its guider; it takes none, or never asks it")


def _edit(concept: str | Mapping[str, Any] | SemanticEdit) -> SemanticEdit | str:
    if not isinstance(concept, Mapping):
        return concept
    known = {field.name for field in dataclasses.fields(SemanticEdit)}
    if "concept" not in concept or (unknown := set(concept) - known):
        wrong = f"has no setting {min(unknown)!r}" if "concept" in concept else "lacks its words"
        raise UserError(f"concept {dict(concept)} {wrong}; write it like {{'concept': 'glasses', 'scale': 8}}")
    return SemanticEdit(**concept)


def _equal(one: Any, other: Any) -> bool:  # noqa: ANN401 - whatever a network takes
    """Whether two inputs of a network are the same value."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return (
            isinstance(other, list | tuple)
            and len(one) == len(other)
            and all(_equal(item, its) for item, its in zip(one, other, strict=True))
        )
    return bool(one == other)


def _rows_as(value: Any, of_prompt: Any) -> Any:  # noqa: ANN401 - whatever a network takes
    """An input with one sample, repeated to as many samples as the prompt's has."""
    if isinstance(value, Tensor) and isinstance(of_prompt, Tensor) and len(value) == 1 < len(of_prompt):
        return value.expand(len(of_prompt), *value.shape[1:])
    if isinstance(value, list) and isinstance(of_prompt, list) and len(value) == 1 < len(of_prompt):
        return value * len(of_prompt)
    return value
