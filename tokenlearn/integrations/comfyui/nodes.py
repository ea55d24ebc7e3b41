"""Nodes of ComfyUI: prompts with strengths of tokens, and semantic guidance."""

from __future__ import annotations

from typing import Any, ClassVar

from tokenlearn.guidance.semantic import ConceptSettings, MomentumAfter, ThresholdOver
from tokenlearn.integrations.comfyui.strengths import Clip, tokenize_with_strengths

CATEGORY = "tokenlearn"
CONCEPTS = "TOKENLEARN_CONCEPTS"
"""Type of the connection between nodes that carries a tuple of concepts."""


def _number(default: float, least: float, most: float, step: float, tooltip: str) -> tuple[str, dict[str, Any]]:
    return "FLOAT", {"default": default, "min": least, "max": most, "step": step, "tooltip": tooltip}


def _steps(default: int, tooltip: str) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": default, "min": 0, "max": 10000, "tooltip": tooltip}


class TextEncodeWithStrengths:
    """Text encoder node for prompts with ``embedding:name*1.5``."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Encodes a prompt in which embedding:name*1.5 is an embedding at strength 1.5. Unlike the weight "
        "(embedding:name:1.5), the strength works in all text encoders, and may be negative."
    )
    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs, as ComfyUI shows them."""
        text = {"multiline": True, "dynamicPrompts": True, "tooltip": "a portrait of a embedding:pirate-tl*1.5 pirate"}
        return {"required": {"clip": ("CLIP",), "text": ("STRING", text)}}

    def encode(self, clip: Clip, text: str) -> tuple[Any]:
        """Conditioning of a prompt.

        Raises:
            UserError: see :func:`tokenlearn.integrations.comfyui.strengths.tokenize_with_strengths`.
        """
        return (clip.encode_from_tokens_scheduled(tokenize_with_strengths(clip, text)),)


class SegaConceptNode:
    """Node that makes a concept of a conditioning, and adds it to others."""

    CATEGORY = CATEGORY
    DESCRIPTION = "A concept that semantic guidance (SEGA) adds to an image, or removes at a negative scale."
    FUNCTION = "add"
    RETURN_TYPES = (CONCEPTS,)
    RETURN_NAMES = ("concepts",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs, as ComfyUI shows them; the defaults are those of :class:`tokenlearn.guidance.ConceptSettings`."""
        default = ConceptSettings()
        return {
            "required": {
                "concept": ("CONDITIONING", {"tooltip": "a prompt of the concept alone, such as: glasses"}),
                "scale": _number(default.scale, -100, 100, 0.1, "strength; negative removes the concept"),
                "threshold": _number(default.threshold or 0, 0, 0.999, 0.01, "share left alone; 0 changes all"),
                "warmup_steps": _steps(default.warmup_steps, "steps before the concept is applied"),
                "cooldown_step": _steps(0, "first step without the concept; 0 for none"),
                "momentum_scale": _number(default.momentum_scale, 0, 1, 0.01, "0 is no momentum"),
                "momentum_beta": _number(default.momentum_beta, 0, 0.99, 0.01, "share of momentum that a step keeps"),
                "weight": _number(default.weight, 0, 100, 0.1, "share in the sum over concepts"),
            },
            "optional": {
                "minus": ("CONDITIONING", {"tooltip": "subtracted from the concept, as in: king - male"}),
                "concepts": (CONCEPTS, {"tooltip": "earlier concepts"}),
            },
        }

    def add(
        self,
        concept: Any,  # noqa: ANN401 - ComfyUI's conditioning
        scale: float,
        threshold: float,
        warmup_steps: int,
        cooldown_step: int,
        momentum_scale: float,
        momentum_beta: float,
        weight: float,
        minus: Any = None,  # noqa: ANN401 - ComfyUI's conditioning
        concepts: tuple[Any, ...] = (),
    ) -> tuple[tuple[Any, ...]]:
        """The concepts with one more.

        Raises:
            UserError: if a setting is out of range.
        """
        from tokenlearn.integrations.comfyui.guider import SegaConcept

        settings = ConceptSettings(
            scale, threshold or None, warmup_steps, cooldown_step or None, weight, momentum_scale, momentum_beta
        )
        added = (
            SegaConcept(settings, (concept,), (1,))
            if minus is None
            else SegaConcept(settings, (concept, minus), (1, -1))
        )
        return ((*concepts, added),)


class SegaGuiderNode:
    """Node that makes a guider, for SamplerCustomAdvanced."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Semantic guidance (SEGA) by any number of concepts, for SamplerCustomAdvanced."
    FUNCTION = "make"
    RETURN_TYPES = ("GUIDER",)

    _over: ClassVar = {"tooltip": "what thresholds are taken over; 'tensor' as published"}
    _after: ClassVar = {"tooltip": "when momentum is added; 'all_warmups' as published"}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs, as ComfyUI shows them."""
        return {
            "required": {
                "model": ("MODEL",),
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "concepts": (CONCEPTS,),
                "cfg": _number(7.5, 0, 100, 0.1, "classifier-free guidance scale of the prompt"),
                "threshold_over": (["tensor", "channel"], cls._over),
                "momentum_after": (["own_warmup", "all_warmups"], cls._after),
            }
        }

    def make(
        self,
        model: Any,  # noqa: ANN401 - ComfyUI's model
        positive: Any,  # noqa: ANN401 - ComfyUI's conditioning
        negative: Any,  # noqa: ANN401 - ComfyUI's conditioning
        concepts: tuple[Any, ...],
        cfg: float,
        threshold_over: ThresholdOver,
        momentum_after: MomentumAfter,
    ) -> tuple[Any]:
        """The guider."""
        from tokenlearn.integrations.comfyui.guider import SegaGuider

        guider = SegaGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        guider.set_concepts(concepts, threshold_over, momentum_after)
        return (guider,)


NODE_CLASS_MAPPINGS = {
    "TokenlearnTextEncode": TextEncodeWithStrengths,
    "TokenlearnSegaConcept": SegaConceptNode,
    "TokenlearnSegaGuider": SegaGuiderNode,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "TokenlearnTextEncode": "Text encode with token strengths (tokenlearn)",
    "TokenlearnSegaConcept": "SEGA concept (tokenlearn)",
    "TokenlearnSegaGuider": "SEGA guider (tokenlearn)",
}
