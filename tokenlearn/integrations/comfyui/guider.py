"""Semantic guidance as a guider of ComfyUI; this module is imported inside ComfyUI alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import comfy.samplers
import torch
from torch import Tensor

from tokenlearn.errors import UserError
from tokenlearn.guidance.semantic import (
    Concept,
    ConceptSettings,
    MomentumAfter,
    SemanticGuidance,
    ThresholdOver,
    check_warmup,
)


class SegaConcept(NamedTuple):
    """A concept as the nodes pass it on.

    Attributes:
        settings: how it is applied.
        conditionings: ComfyUI's conditioning of each term.
        signs: 1 or -1 for each term.
    """

    settings: ConceptSettings
    conditionings: tuple[Any, ...]
    signs: tuple[int, ...]


class SegaGuider(comfy.samplers.CFGGuider):  # type: ignore[misc]
    """Classifier-free guidance plus the guidance of concepts.

    ComfyUI's networks predict clean latents ``x0``. Semantic guidance is computed on ``(x - x0) / sigma``, which is
    the predicted noise, or the velocity of flow models, so that momentum has the same units at all steps.

    Samplers with several evaluations of the network in a step (Heun, DPM-2) move the momentum at each of them.
    """

    def set_concepts(
        self, concepts: Sequence[SegaConcept], threshold_over: ThresholdOver, momentum_after: MomentumAfter
    ) -> None:
        """Set the concepts, after conditionings.

        Args:
            concepts: the concepts.
            threshold_over: see :func:`tokenlearn.guidance.tail_mask`.
            momentum_after: see :class:`tokenlearn.guidance.SEGA`.
        """
        terms = [conditioning for concept in concepts for conditioning in concept.conditionings]
        self._names = [f"concept_{index}" for index in range(len(terms))]
        self.inner_set_conds(dict(zip(self._names, terms, strict=True)))
        parts = [Concept(concept.settings, concept.signs) for concept in concepts]
        # The prompt's guidance is ComfyUI's, whose hooks other nodes use: at scale 0 and relative to the negative
        # prompt, what is left of the rule is the guidance of concepts.
        self._rule = SemanticGuidance(0.0, parts, threshold_over, momentum_after=momentum_after).fresh()

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: int | None = None
    ) -> Any:  # noqa: ANN401 - ComfyUI has no types
        """Guided prediction (B, ...) of clean latents, as ComfyUI's guiders make it.

        Args:
            x: noisy latents (B, ...).
            timestep: noise levels (B,), which are sigmas.
            model_options: ComfyUI's options of the run.
            seed: seed of the run.

        Raises:
            UserError: if a warm-up takes all steps of the sampler, or thresholds cannot be taken over channels.
        """
        step = self._step(timestep, model_options)
        needed = [index - 2 for index in self._rule.needed(step) if index >= 2]
        if not needed:
            plain: Tensor = super().predict_noise(x, timestep, model_options, seed)
            return plain
        if self._rule.threshold_over == "channel" and x.ndim < 4:
            raise UserError(f"latents of shape {tuple(x.shape)} have no channels; set threshold_over to 'tensor'")
        positive, negative = self.conds.get("positive"), self.conds.get("negative")
        conds = [positive, negative, *(self.conds[self._names[index]] for index in needed)]
        found = self._evaluated(conds, x, timestep, model_options)
        outputs = found[:2]
        for hook in model_options.get("sampler_pre_cfg_function", []):
            outputs = hook(
                {
                    "conds": conds[:2],
                    "conds_out": outputs,
                    "cond_scale": self.cfg,
                    "timestep": timestep,
                    "input": x,
                    "sigma": timestep,
                    "model": self.inner_model,
                    "model_options": model_options,
                }
            )
        guided = comfy.samplers.cfg_function(
            self.inner_model,
            outputs[0],
            outputs[1],
            self.cfg,
            x,
            timestep,
            model_options=model_options,
            cond=positive,
            uncond=negative,
        )
        sigma = timestep.reshape(-1, *[1] * (x.ndim - 1))
        nothing = torch.zeros_like(x)
        # x - x0 of a term minus x - x0 of the negative prompt.
        terms = [(found[1] - term) / sigma for term in found[2:]]
        return guided - sigma * self._rule([nothing, nothing, *terms], step)

    def _evaluated(self, conds: list[Any], x: Tensor, timestep: Tensor, model_options: dict[str, Any]) -> list[Tensor]:
        """Predictions of clean latents for conditionings, together."""
        if (replaced := model_options.get("sampler_calc_cond_batch_function")) is not None:
            arguments = {"conds": conds, "input": x, "sigma": timestep, "model": self.inner_model}
            return list(replaced({**arguments, "model_options": model_options}))
        return list(comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options))

    def _step(self, timestep: Tensor, model_options: dict[str, Any]) -> int:
        """Index of the sampling step that a noise level belongs to: the last step that begins at it or above."""
        starts = model_options["transformer_options"]["sample_sigmas"][:-1]
        for concept in self._rule.concepts:
            if concept.is_possible:
                check_warmup(concept.settings.warmup_steps, len(starts), "a concept")
        reached = starts >= timestep.flatten()[0] * (1 - 1e-5)  # samplers round
        return max(int(reached.sum()) - 1, 0)
