"""Portraits: a small procedural world in which the published experiments have an exact miniature."""

from tokenlearn.data.portraits.captions import (
    ABSENCE_PHRASES,
    ATTRIBUTE_PHRASES,
    attribute_prompt,
    caption,
    described_persona,
)
from tokenlearn.data.portraits.dataset import (
    PERSONA_LABELS,
    attribute_mask,
    export_folder,
    portrait,
    portrait_captions,
    portrait_of_persona,
    portraits_dataset,
)
from tokenlearn.data.portraits.drawing import IMAGE_SIZE, draw
from tokenlearn.data.portraits.scene import (
    ATTRIBUTES,
    HAIR_COLORS,
    ORDINARY,
    PARTS,
    PERSONAS,
    STYLES,
    Scene,
    sample_scene,
    with_attribute,
)

__all__ = [
    "ABSENCE_PHRASES",
    "ATTRIBUTES",
    "ATTRIBUTE_PHRASES",
    "HAIR_COLORS",
    "IMAGE_SIZE",
    "ORDINARY",
    "PARTS",
    "PERSONAS",
    "PERSONA_LABELS",
    "STYLES",
    "Scene",
    "attribute_mask",
    "attribute_prompt",
    "caption",
    "described_persona",
    "draw",
    "export_folder",
    "portrait",
    "portrait_captions",
    "portrait_of_persona",
    "portraits_dataset",
    "sample_scene",
    "with_attribute",
]
