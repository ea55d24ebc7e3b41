"""Semantic guidance: steer an image along directions that prompts or learned tokens stand for.

Equation numbers are those of SEGA (Brack et al., 2023, https://arxiv.org/abs/2301.12247).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from typing import Literal, Self

import torch
from torch import Tensor

from tokenlearn.errors import UserError
from tokenlearn.guidance.base import C, GuidanceRule
from tokenlearn.guidance.classifier_free import ClassifierFreeGuidance, classifier_free_guidance

ThresholdOver = Literal["tensor", "channel"]
MomentumAfter = Literal["own_warmup", "all_warmups"]


def semantic_direction(unconditional: Tensor, terms: Sequence[Tensor], signs: Sequence[int]) -> Tensor:
    """Direction of a concept, ``psi = sum_j sign_j (e_j - e_0)``: equation 5.

    One term is the paper's equation; several are its arithmetic of concepts, such as ``king - male + female``. Within
    a step, velocity and x0 predictions differ from noise predictions by a factor that all share, so they give the same
    direction in other units.

    Args:
        unconditional: (B, C, h, w) prediction ``e_0``.
        terms: (B, C, h, w) prediction ``e_j`` for each term, at least one.
        signs: 1 or -1 for each term.

    Returns:
        (B, C, h, w) direction.
    """
    return reduce(torch.add, (sign * (term - unconditional) for term, sign in zip(terms, signs, strict=True)))


def tail_mask(direction: Tensor, threshold: float, over: ThresholdOver = "tensor") -> Tensor:
    """Where a direction is among the largest in magnitude of its sample, ``|psi| >= eta_lambda(|psi|)``: equation 6.

    Args:
        direction: (B, C, h, w) ``psi``.
        threshold: ``lambda`` in (0, 1), the share of elements that is left out.
        over: what the quantile ``eta`` is taken over: a sample's whole ``tensor``, as in the paper, or each of its
            channels alone, as in diffusers' pipeline.

    Returns:
        (B, C, h, w) booleans.
    """
    magnitudes = direction.abs().flatten(1 if over == "tensor" else 2)
    quantile = torch.quantile(magnitudes, threshold, dim=-1, keepdim=True)
    return (magnitudes >= quantile).reshape(direction.shape)


def concept_guidance(
    direction: Tensor, scale: float | Tensor, threshold: float | None, over: ThresholdOver = "tensor"
) -> Tensor:
    """Guidance by one concept, ``gamma = mu psi`` with ``mu`` the scale in the tails and 0 elsewhere: equations 4, 6.

    Args:
        direction: (B, C, h, w) ``psi``.
        scale: ``s_e``, a number or (B,) one for each sample; negative values remove the concept.
        threshold: ``lambda`` in (0, 1), or None to keep all elements.
        over: see :func:`tail_mask`.

    Returns:
        (B, C, h, w) guidance.
    """
    if isinstance(scale, Tensor):
        scale = scale.reshape(-1, *[1] * (direction.ndim - 1))
    guidance = scale * direction
    # The mask is that of the direction alone, but where an element is the quantile itself, diffusers rounds it so.
    return guidance if threshold is None else torch.where(tail_mask(guidance, threshold, over), guidance, 0)


def with_momentum(guidance: Tensor, momentum: Tensor, momentum_scale: float) -> Tensor:
    """``gamma + s_m nu``: equation 8.

    Args:
        guidance: (B, C, h, w) guidance of the step.
        momentum: (B, C, h, w) ``nu``, zero at the first step.
        momentum_scale: ``s_m`` in [0, 1].

    Returns:
        (B, C, h, w) guidance.
    """
    return torch.add(guidance, momentum, alpha=momentum_scale)


def update_momentum(momentum: Tensor, guidance: Tensor, momentum_beta: float) -> Tensor:
    """``nu <- beta nu + (1 - beta) gamma``: equation 9.

    Args:
        momentum: (B, C, h, w) ``nu``.
        guidance: (B, C, h, w) ``gamma`` of :func:`with_momentum`.
        momentum_beta: ``beta_m`` in [0, 1).

    Returns:
        (B, C, h, w) momentum for the next step.
    """
    return torch.lerp(guidance, momentum, momentum_beta)


def total_guidance(guidances: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Guidance by all concepts, ``gamma_hat = sum_i g_i gamma_i``: equation 10.

    The weights are not normalised, so that a concept does not change in strength when another one sets in.

    Args:
        guidances: (B, C, h, w) ``gamma_i`` of each concept, at least one.
        weights: ``g_i``, which is 0 where :meth:`ConceptSettings.is_applied` is not true.

    Returns:
        (B, C, h, w) guidance.
    """
    return reduce(torch.add, (weight * guidance for guidance, weight in zip(guidances, weights, strict=True)))


def semantically_guided(unconditional: Tensor, conditional: Tensor, guidance_scale: float, guidance: Tensor) -> Tensor:
    """``e = e_0 + s_g (e_p - e_0) + gamma_hat``: equation 3, with the guidance of all concepts.

    Args:
        unconditional: (B, C, h, w) prediction ``e_0``.
        conditional: (B, C, h, w) prediction ``e_p`` for the prompt.
        guidance_scale: ``s_g``.
        guidance: (B, C, h, w) ``gamma_hat``.

    Returns:
        (B, C, h, w) guided prediction.
    """
    return classifier_free_guidance(unconditional, conditional, guidance_scale) + guidance


def check_momentum(warmup_steps: int, momentum_scale: float, momentum_beta: float) -> None:
    """Refuse a warm-up or momentum that cannot be.

    Raises:
        UserError: naming the one that is out of range.
    """
    if warmup_steps < 0:
        raise UserError(f"warmup_steps must be at least 0, got {warmup_steps}")
    if not 0 <= momentum_scale <= 1:
        raise UserError(f"momentum_scale must be in [0, 1], got {momentum_scale}; 0 is no momentum")
    if not 0 <= momentum_beta < 1:
        raise UserError(f"momentum_beta must be in [0, 1), got {momentum_beta}; 0 keeps nothing of earlier steps")


def check_warmup(warmup_steps: int, steps: int, owner: str) -> None:
    """Refuse a warm-up that takes all steps.

    Args:
        warmup_steps: steps before the guidance is applied.
        steps: steps of the sampler.
        owner: what the warm-up belongs to, for the message.

    Raises:
        UserError: naming both numbers.
    """
    if warmup_steps >= steps:
        raise UserError(f"warmup_steps {warmup_steps} of {owner} leaves no step of {steps}; set fewer")


@dataclass(frozen=True)
class ConceptSettings:
    """How a concept is applied.

    Attributes:
        scale: ``s_e``, 3 to 20; a negative one removes the concept.
        threshold: ``lambda`` in (0, 1), the share of latent elements that the concept leaves alone: 0.95 to 0.99 for
            parts of an image, 0.9 for its style; None to change all.
        warmup_steps: ``delta``, steps before the concept is applied; more of them keep more of the composition.
        cooldown_step: first step at which it is not applied any more, or None.
        weight: ``g``, its share in the sum over concepts.
        momentum_scale: ``s_m`` in [0, 1]; 0 is no momentum, and warm-up steps then cost no evaluation.
        momentum_beta: ``beta_m`` in [0, 1), the share of the momentum that a step keeps.

    Raises:
        UserError: if one is out of range.
    """

    scale: float = 5.0
    threshold: float | None = 0.9
    warmup_steps: int = 10
    cooldown_step: int | None = None
    weight: float = 1.0
    momentum_scale: float = 0.1
    momentum_beta: float = 0.4

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise UserError(f"the scale of a concept must be a finite number, got {self.scale}")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise UserError(f"threshold must be in (0, 1), got {self.threshold}; null changes all elements")
        check_momentum(self.warmup_steps, self.momentum_scale, self.momentum_beta)
        if self.cooldown_step is not None and self.cooldown_step <= self.warmup_steps:
            raise UserError(
                f"cooldown_step must be above warmup_steps {self.warmup_steps}, got {self.cooldown_step}; otherwise "
                "the concept is never applied"
            )
        if not 0 <= self.weight < math.inf:
            raise UserError(f"weight must be a number of at least 0, got {self.weight}; a negative scale removes")

    @property
    def is_composable(self) -> bool:
        """Whether nothing of semantic guidance is left, so that the concept is a term of composable guidance."""
        always = self.warmup_steps == 0 and self.cooldown_step is None
        return always and self.threshold is None and self.momentum_scale == 0

    def is_applied(self, step: int) -> bool:
        """Whether the concept acts at a step: after its warm-up and before its cool-down."""
        return self.warmup_steps <= step and (self.cooldown_step is None or step < self.cooldown_step)

    def is_needed(self, step: int) -> bool:
        """Whether the concept acts at a step or gathers momentum for later ones."""
        return self.is_applied(step) or (step < self.warmup_steps and self.momentum_scale > 0)


@dataclass(frozen=True, eq=False)
class Concept:
    """A signed sum of terms with its settings: one prompt or learned token, or several as in ``king - male + female``.

    Attributes:
        settings: how it is applied.
        signs: 1 or -1 for each term.
        sample_scales: (B,) scale of each sample in place of the scale in the settings, so that one batch can have
            images with and without the concept.

    Raises:
        UserError: if there is no term, a sign is neither 1 nor -1, or scales are not (B,) finite numbers.
    """

    settings: ConceptSettings = ConceptSettings()
    signs: Sequence[int] = (1,)
    sample_scales: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.signs or not set(self.signs) <= {1, -1}:
            raise UserError(f"the signs of a concept's terms must be 1 or -1, one for each, got {list(self.signs)}")
        scales = self.scales
        if scales.ndim > 1 or (self.sample_scales is not None and scales.ndim == 0) or not scales.isfinite().all():
            raise UserError(f"sample_scales must be finite numbers, one per sample, got {scales.tolist()}")

    @property
    def scales(self) -> Tensor:
        """() or (B,) scale."""
        return torch.tensor(self.settings.scale) if self.sample_scales is None else self.sample_scales

    @property
    def is_possible(self) -> bool:
        """Whether it acts on any sample at any step."""
        return self.settings.weight > 0 and bool(self.scales.any())


class SemanticGuidance(GuidanceRule):
    """Semantic guidance (SEGA) by concepts whose conditionings are given.

    :class:`tokenlearn.guidance.SEGA` is the rule with concepts as words.

    Every sample is treated by itself: a batch gives what its samples give one by one. Momentum is kept for each
    concept, ``nu_i <- beta_i nu_i + (1 - beta_i) gamma_i`` from the first step on, and applied with the concept after
    its own warm-up. The paper and diffusers keep one ``nu`` of the summed guidance; momentum being linear in it, that
    is ``sum_i g_i nu_i``, the same wherever all concepts share warm-up, ``s_m`` and ``beta_m``. Where they do not, no
    concept waits for the slowest one or changes in strength when that sets in; with ``all_warmups``, momentum waits as
    in the paper. From its cool-down on, a concept and its momentum are gone.

    Each run of the sampler has its momentum and recording, on the device and with their graph; step 0 forgets them.

    Args:
        guidance_scale: ``s_g`` of the prompt; at 1 the unconditional prediction is evaluated only for concepts.
        concepts: the concepts; one with scale 0 for all samples is never evaluated.
        threshold_over: what quantiles are taken over, see :func:`tail_mask`.
        record: keep the total guidance of every step.
        momentum_after: when the momentum of a concept is added to its guidance: after its ``own_warmup``; or as in the
            paper once ``all_warmups`` are over, while guidance without momentum sets in with each concept.

    Raises:
        UserError: if the guidance scale is not finite, or ``momentum_after`` is neither.
    """

    def __init__(
        self,
        guidance_scale: float,
        concepts: Sequence[Concept],
        threshold_over: ThresholdOver = "tensor",
        record: bool = False,
        momentum_after: MomentumAfter = "own_warmup",
    ) -> None:
        if not math.isfinite(guidance_scale):
            raise UserError(f"guidance_scale must be a finite number, got {guidance_scale}")
        if momentum_after not in ("own_warmup", "all_warmups"):
            raise UserError(f"momentum_after must be own_warmup or all_warmups, got {momentum_after!r}")
        self.guidance_scale, self.threshold_over, self.record = guidance_scale, threshold_over, record
        self.momentum_after: MomentumAfter = momentum_after
        self.concepts = list(concepts)
        self._possible = [concept.is_possible for concept in self.concepts]
        acting = [concept for concept, possible in zip(self.concepts, self._possible, strict=True) if possible]
        self._last_warmup = max((concept.settings.warmup_steps for concept in acting), default=0)
        self._scales: list[Tensor] = []
        self._momenta: dict[int, Tensor] = {}
        self._recorded: list[Tensor] = []

    @property
    def has_memory(self) -> bool:
        """See :class:`GuidanceRule`."""
        return any(concept.is_possible and concept.settings.momentum_scale > 0 for concept in self.concepts)

    def fresh(self) -> Self:
        """See :class:`GuidanceRule`."""
        fresh = super().fresh()
        fresh._scales, fresh._momenta, fresh._recorded = [], {}, []
        return fresh

    def conditionings(self, unconditional: C, prompt: C, *terms: C) -> list[C]:
        """See :class:`GuidanceRule`; terms are those of the first concept, then of the second, and so on.

        Raises:
            ValueError: if there are not as many terms as the concepts have.
        """
        count = sum(len(concept.signs) for concept in self.concepts)
        if len(terms) != count:
            raise ValueError(f"{len(terms)} terms for concepts that have {count}")
        return [unconditional, prompt, *terms]

    def needed(self, step: int) -> list[int]:
        """Indices of :meth:`conditionings` that matter at a step or, through momentum, at a later one."""
        active, first = self._active(step), 2
        terms: list[int] = []
        for index, concept in enumerate(self.concepts):
            if index in active:
                terms += range(first, first + len(concept.signs))
            first += len(concept.signs)
        return [1] if self.guidance_scale == 1 and not terms else [0, 1, *terms]

    def __call__(self, predictions: Sequence[Tensor], step: int) -> Tensor:
        """See :class:`GuidanceRule`; step 0 forgets everything before it.

        Raises:
            UserError: if a concept has scales for another number of samples.
        """
        if step == 0 or len(self._scales) < len(self.concepts):  # O-BELM goes on from a pair at step 1
            self._start(predictions[0])
        if len(predictions) == 1:  # neither the unconditional prediction nor any concept is needed
            (guided,) = predictions
            guidance = None
        else:
            unconditional, conditional, *terms = predictions
            guidance = self._guidance(unconditional, terms, step)
            if guidance is None:
                guided = classifier_free_guidance(unconditional, conditional, self.guidance_scale)
            else:
                guided = semantically_guided(unconditional, conditional, self.guidance_scale, guidance)
        if self.record:
            self._recorded.append(torch.zeros_like(guided) if guidance is None else guidance)
        return guided

    @property
    def recorded(self) -> Tensor:
        """(T, B, C, h, w) total guidance ``gamma_hat`` of the T steps since step 0, for :class:`RecordedGuidance`.

        Raises:
            ValueError: if nothing was recorded.
        """
        if not self._recorded:
            raise ValueError("no guidance was recorded; set record, and sample first")
        return torch.stack(self._recorded)

    def _active(self, step: int) -> list[int]:
        """Indices of the concepts that are needed at a step."""
        return [
            index
            for index, concept in enumerate(self.concepts)
            if self._possible[index] and concept.settings.is_needed(step)
        ]

    def _start(self, prediction: Tensor) -> None:
        """Forget the last call of the sampler; move scales to the device once, not at every step."""
        scales = [concept.scales for concept in self.concepts]
        for of_concept in scales:
            if of_concept.ndim and len(of_concept) != len(prediction):
                raise UserError(
                    f"a concept has {len(of_concept)} sample_scales for {len(prediction)} samples; give one for each"
                )
        self._scales = [of_concept.to(prediction) for of_concept in scales]
        self._momenta, self._recorded = {}, []

    def _guidance(self, unconditional: Tensor, predictions: Sequence[Tensor], step: int) -> Tensor | None:
        """``gamma_hat`` of a step from the predictions for the terms of active concepts, None if none is applied."""
        remaining = iter(predictions)
        applied, weights = [], []
        for index in self._active(step):
            concept = self.concepts[index]
            settings = concept.settings
            terms = list(islice(remaining, len(concept.signs)))
            direction = semantic_direction(unconditional, terms, concept.signs)
            guidance = concept_guidance(direction, self._scales[index], settings.threshold, self.threshold_over)
            if settings.momentum_scale > 0:
                momentum = self._momenta[index] if index in self._momenta else torch.zeros_like(guidance)
                moved = with_momentum(guidance, momentum, settings.momentum_scale)
                self._momenta[index] = update_momentum(momentum, moved, settings.momentum_beta)
                if self.momentum_after == "own_warmup" or step >= self._last_warmup:
                    guidance = moved
            if settings.is_applied(step):
                applied.append(guidance)
                weights.append(settings.weight)
        return total_guidance(applied, weights) if applied else None


class RecordedGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance plus semantic guidance that was recorded for another image with the same seed.

    A concept's guidance is nearly the same for other prompts as long as the initial noise is the same (uniqueness,
    section 4 of SEGA), so it can be used again without evaluating the concept.

    Args:
        guidance_scale: ``s_g`` of the prompt; 1 evaluates the prompt alone.
        vectors: (T, B, C, h, w) from :attr:`SemanticGuidance.recorded`, with B samples or one that all share.

    Raises:
        ValueError: if the vectors have another number of dimensions.
    """

    def __init__(self, guidance_scale: float, vectors: Tensor) -> None:
        super().__init__(guidance_scale)
        if vectors.ndim != 5:
            raise ValueError(f"recorded guidance must be (T, B, C, h, w), got {tuple(vectors.shape)}")
        self.vectors = vectors

    def __call__(self, predictions: Sequence[Tensor], step: int) -> Tensor:
        """See :class:`GuidanceRule`.

        Raises:
            UserError: if the guidance was recorded with fewer steps or for other samples.
        """
        guided = super().__call__(predictions, step)
        if step >= len(self.vectors):
            raise UserError(f"guidance was recorded for {len(self.vectors)} steps; sample with as many")
        vector = self.vectors[step].to(guided)
        if vector.shape[1:] != guided.shape[1:] or len(vector) not in (1, len(guided)):
            raise UserError(
                f"guidance was recorded for latents of shape {tuple(vector.shape)}, not {tuple(guided.shape)}; "
                "give as many samples of the same size"
            )
        return guided + vector
