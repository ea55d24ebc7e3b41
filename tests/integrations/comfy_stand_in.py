"""A small stand-in of ComfyUI 0.38.1, with the names and signatures that the nodes use, and what these return.

It has neither hooks, areas and masks nor devices and batches in memory; conditionings are one row each.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class InnerModel:
    """What ComfyUI calls ``inner_model``: it predicts clean latents.

    Args:
        predict: of latents (B, ...), noise level () and a conditioning's tensor.
    """

    def __init__(self, predict: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.predict = predict
        self.calls: list[int] = []

    def process_latent_out(self, latents: Tensor) -> Tensor:
        return latents


class ModelPatcher:
    """ComfyUI's MODEL."""

    def __init__(self, model: InnerModel) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}


def calc_cond_batch(
    model: InnerModel, conds: list[list[dict] | None], x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> list[Tensor]:
    """Clean latents for each conditioning; zeros for one that is None."""
    model.calls.append(sum(cond is not None for cond in conds))
    return [
        torch.zeros_like(x_in) if cond is None else model.predict(x_in, timestep[0], cond[0]["cross_attn"])
        for cond in conds
    ]


def cfg_function(
    model: InnerModel,
    cond_pred: Tensor,
    uncond_pred: Tensor,
    cond_scale: float,
    x: Tensor,
    timestep: Tensor,
    model_options: Mapping[str, Any] = {},
    cond: Any = None,
    uncond: Any = None,
) -> Tensor:
    """Classifier-free guidance of clean latents, with the hooks of other nodes."""
    if "sampler_cfg_function" in model_options:
        given = {"cond": x - cond_pred, "uncond": x - uncond_pred, "cond_scale": cond_scale, "sigma": timestep}
        guided = x - model_options["sampler_cfg_function"](given)
    else:
        guided = uncond_pred + (cond_pred - uncond_pred) * cond_scale
    for hook in model_options.get("sampler_post_cfg_function", []):
        guided = hook({"denoised": guided, "cond_denoised": cond_pred, "uncond_denoised": uncond_pred, "input": x})
    return guided


class CFGGuider:
    """ComfyUI's guider."""

    def __init__(self, model_patcher: ModelPatcher) -> None:
        self.model_patcher = model_patcher
        self.model_options = model_patcher.model_options
        self.original_conds: dict[str, list[dict]] = {}
        self.cfg = 1.0

    def set_conds(self, positive: list, negative: list) -> None:
        self.inner_set_conds({"positive": positive, "negative": negative})

    def set_cfg(self, cfg: float) -> None:
        self.cfg = cfg

    def inner_set_conds(self, conds: Mapping[str, list]) -> None:
        for name, conditioning in conds.items():
            self.original_conds[name] = [{**about, "cross_attn": tensor} for tensor, about in conditioning]

    def __call__(self, x: Tensor, timestep: Tensor, model_options: dict = {}, seed: int | None = None) -> Tensor:  # noqa: B006
        return self.predict_noise(x, timestep, model_options, seed)

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict = {}, seed: int | None = None) -> Tensor:  # noqa: B006
        positive, negative = self.conds["positive"], self.conds["negative"]
        conds = [positive, None if self.cfg == 1 else negative]
        outputs = calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        for hook in model_options.get("sampler_pre_cfg_function", []):
            outputs = hook({"conds_out": outputs, "cond_scale": self.cfg})
        return cfg_function(self.inner_model, *outputs, self.cfg, x, timestep, model_options=model_options)

    def sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        sampler: EulerSampler,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Any = None,
        disable_pbar: bool = False,
        seed: int | None = None,
    ) -> Tensor:
        self.conds = {name: [dict(item) for item in items] for name, items in self.original_conds.items()}
        self.inner_model = self.model_patcher.model
        options = {**self.model_options, "transformer_options": {"sample_sigmas": sigmas}}
        arguments = {"model_options": options, "seed": seed}
        samples = sampler.sample(self, sigmas, arguments, callback, noise, latent_image, denoise_mask, disable_pbar)
        del self.conds, self.inner_model
        return self.model_patcher.model.process_latent_out(samples)


class EulerSampler:
    """ComfyUI's ``euler``, from pure noise; ``heun`` evaluates the model a second time in each step."""

    def __init__(self, heun: bool = False) -> None:
        self.heun = heun

    def sample(
        self,
        model_wrap: CFGGuider,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None,
        disable_pbar: bool,
    ) -> Tensor:
        x = noise * sigmas[0] + latent_image
        ones = torch.ones(len(x))
        for sigma, following in itertools.pairwise(sigmas):
            slope = (x - model_wrap(x, sigma * ones, **extra_args)) / sigma
            moved = x + (following - sigma) * slope
            if self.heun and following > 0:
                second = (moved - model_wrap(moved, following * ones, **extra_args)) / following
                moved = x + (following - sigma) * (slope + second) / 2
            x = moved
        return x


class Clip:
    """ComfyUI's CLIP with two text encoders: ``l`` obeys weights, ``t5xxl`` reads them as text.

    Args:
        embeddings: by name, vectors (n, width) for each encoder, or for some of them.
    """

    def __init__(self, embeddings: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.embeddings = embeddings
        self.encoded: Any = None

    def tokenize(self, text: str) -> dict[str, list[list[tuple]]]:
        return {encoder: [self._units(text, encoder)] for encoder in ("l", "t5xxl")}

    def encode_from_tokens_scheduled(self, tokens: dict) -> list:
        self.encoded = tokens
        return [[torch.zeros(1, 77, 8), {}]]

    def _units(self, text: str, encoder: str) -> list[tuple]:
        weight = 1.0
        if encoder == "l" and (found := re.fullmatch(r"(.*)\((.*):([\d.]+)\)(.*)", text)):
            before, inside, weight, after = *found.groups()[:2], float(found[3]), found[4]
            return [
                *self._words(before, 1.0, encoder),
                *self._words(inside, weight, encoder),
                *self._words(after, 1.0, encoder),
            ]
        return self._words(text, weight, encoder)

    def _words(self, text: str, weight: float, encoder: str) -> list[tuple]:
        units: list[tuple] = []
        for word in re.split(r"(?<=\s)(?=embedding:)", text):
            rest = word
            if word.startswith("embedding:"):
                name, _, rest = word.removeprefix("embedding:").partition(" ")
                vectors = self.embeddings.get(name, {}).get(encoder)
                units += [] if vectors is None else [(vector, weight) for vector in vectors]
            units += [(sum(map(ord, part)), weight) for part in rest.split()]
        return units


def install(monkeypatch: Any) -> ModuleType:
    """Make ``import comfy.samplers`` give the stand-in, and return that module."""
    samplers = ModuleType("comfy.samplers")
    for part in (CFGGuider, calc_cond_batch, cfg_function):
        setattr(samplers, part.__name__, part)
    package = ModuleType("comfy")
    package.samplers = samplers
    monkeypatch.setitem(__import__("sys").modules, "comfy", package)
    monkeypatch.setitem(__import__("sys").modules, "comfy.samplers", samplers)
    return samplers
