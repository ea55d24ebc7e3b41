"""Edits pasted as differences onto the image at its full size, so that what is not edited keeps every detail."""

from __future__ import annotations

from typing import Literal

from PIL import Image
from torch import Tensor
from torch.nn import functional

from tokenlearn.data.pixels import rgb_pixels, unit_range
from tokenlearn.pipeline import to_images

Paste = Literal["larger", "always", "never"]
"""Which images an edit is pasted onto as a difference: those larger than the model's size, all, or none.

Without pasting, the result is the edit itself, resized: all of the image passes through the model at its size.
"""


def paste_difference(original: Tensor, edited: Tensor, unedited: Tensor) -> Tensor:
    """What an edit changes, enlarged and added to the original: ``original + up(edited - unedited)``.

    The result of no change is the original itself, whatever the model loses of an image.

    Args:
        original: (B, 3, H, W) in [0, 1].
        edited: (B, 3, h, w) edits at the model's size.
        unedited: (B, 3, h, w) or (1, 3, h, w) the same at strength 0: inverted and denoised without an edit.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    difference = edited - unedited
    if difference.shape[-2:] != original.shape[-2:]:
        difference = functional.interpolate(difference, original.shape[-2:], mode="bicubic", antialias=True)
    return (original + difference).clamp(0, 1)


def is_pasted(paste: Paste, original: tuple[int, int], model: tuple[int, int]) -> bool:
    """Whether an edit is pasted onto an image.

    Args:
        paste: the setting.
        original: width and height of the image.
        model: width and height at which the model takes it.
    """
    return paste == "always" or (paste == "larger" and original[0] * original[1] > model[0] * model[1])


def pasted_image(original: Image.Image, edited: Tensor, unedited: Tensor) -> Image.Image:
    """:func:`paste_difference` for an RGB image and an edit (3, h, w) with its twin at strength 0.

    Raises:
        UserError: if a value is not finite.
    """
    pixels = unit_range([rgb_pixels(original)])
    made = paste_difference(pixels, edited[None].float().cpu(), unedited[None].float().cpu())
    return to_images(made)[0]
