"""Styles, which are applied to a drawn portrait."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenlearn.data.portraits.scene import Scene

Pixels = NDArray[np.floating[Any]]

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def apply_style(drawing: Image.Image, scene: Scene) -> Image.Image:
    """Light the drawing and render it in the scene's style.

    Every style preserves a part of the colours, so that hair colour and makeup remain visible.
    """
    pixels = _light(np.asarray(drawing, dtype=np.float32) / 255, scene.light)
    if scene.style == "sketch":
        pixels = _sketch(pixels)
    elif scene.style == "painting":
        pixels = _painting(pixels)
    elif scene.style == "night":
        pixels = pixels * np.array([0.5, 0.56, 0.78], dtype=np.float32) + np.array([0.02, 0.03, 0.1], dtype=np.float32)
    elif scene.style == "old photograph":
        pixels = _old_photograph(pixels)
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))


def _grid(pixels: Pixels) -> tuple[Pixels, Pixels]:
    side = np.linspace(-1, 1, pixels.shape[0], dtype=np.float32)
    return side[None, :, None], side[:, None, None]


def _light(pixels: Pixels, angle: float) -> Pixels:
    x, y = _grid(pixels)
    return pixels * (1 + 0.1 * (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))))


def _sketch(pixels: Pixels) -> Pixels:
    luma = pixels @ _LUMA
    down, right = np.zeros_like(luma), np.zeros_like(luma)
    down[:-1], right[:, :-1] = np.diff(luma, axis=0), np.diff(luma, axis=1)
    lines = np.clip(0.95 * np.sqrt(down**2 + right**2), 0, 0.6)
    paper = np.array([0.97, 0.96, 0.93], dtype=np.float32)
    wash = paper * 0.45 + (0.3 * luma[..., None] + 0.7 * pixels) * 0.55
    drawn: Pixels = wash * (1 - lines[..., None])
    return drawn


def _painting(pixels: Pixels) -> Pixels:
    saturated = np.clip(pixels + 0.45 * (pixels - (pixels @ _LUMA)[..., None]), 0, 1)
    x, y = _grid(pixels)
    strokes = 0.06 * np.sin(9 * (x + y) + 2.2 * np.sin(5 * y))
    return saturated + strokes


def _old_photograph(pixels: Pixels) -> Pixels:
    sepia = (pixels @ _LUMA)[..., None] * np.array([1.04, 0.86, 0.64], dtype=np.float32) + np.float32(0.06)
    x, y = _grid(pixels)
    vignette = 1 - 0.42 * np.clip(x**2 + y**2 - 0.35, 0, 1)
    faded: Pixels = (0.62 * sepia + 0.38 * pixels) * vignette
    return faded
