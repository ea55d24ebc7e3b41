"""One-step classifier guidance, the baseline that DOODL is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenlearn.diffusion.schedule import convert, x0_from_noise
from tokenlearn.guidance.classifier_free import classifier_free_guidance
from tokenlearn.models import Conditioning, DiffusionBackbone


class OneStepGuidance:
    """A diffusion model whose noise prediction descends a loss of what it predicts to come out, at every step.

    Classifier guidance (Dhariwal and Nichol, 2021, https://arxiv.org/abs/2105.05233, algorithm 2) for networks that
    know no noise, as the released code of DOODL has it. With the unconditional prediction ``e_0`` at the latents
    ``z = alpha x0 + sigma e`` and the prediction ``x0`` that follows from it,

        e <- e + s sigma grad_z l(decode(sigma x0 + (1 - sigma) z)),

    ``e`` being the prediction under classifier-free guidance.

    Args:
        backbone: frozen diffusion model.
        unconditional: one row.
        guidance_scale: of classifier-free guidance.
        loss: images (B, 3, H, W), nominally in [0, 1], and the timestep to losses (B,).
        scale: ``s``.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        unconditional: Conditioning,
        guidance_scale: float,
        loss: Callable[[Tensor, int], Tensor],
        scale: float,
    ) -> None:
        self.backbone, self.unconditional, self.guidance_scale = backbone, unconditional, guidance_scale
        self.loss, self.scale = loss, scale
        self.alphas, self.sigmas = backbone.alphas, backbone.sigmas

    def __call__(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The guided prediction (B, C, h, w), of the backbone's kind; arguments as :meth:`predict_noise` has them."""
        noise = self.predict_noise(latents, timesteps, conditioning)
        index = timesteps.long()
        return convert(
            noise, latents, self.alphas[index], self.sigmas[index], "epsilon", self.backbone.prediction_type
        )

    def predict_noise(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The guided noise prediction (B, C, h, w), without a graph.

        Args:
            latents: (B, C, h, w).
            timesteps: ().
            conditioning: B rows of the prompts.
        """
        index = timesteps.long()
        alpha, sigma = self.alphas[index], self.sigmas[index]
        with torch.enable_grad():
            noisy = latents.detach().requires_grad_()
            plain = self.backbone.predict_noise(noisy, timesteps, self.unconditional.expand(len(latents)))
            blended = sigma * x0_from_noise(noisy, plain, alpha, sigma) + (1 - sigma) * noisy
            losses = self.loss(self.backbone.decode_latents(blended), int(timesteps))
            (gradient,) = torch.autograd.grad(losses.sum(), noisy)
        with torch.no_grad():
            prompted = self.backbone.predict_noise(latents, timesteps, conditioning)
        guided = classifier_free_guidance(plain.detach(), prompted, self.guidance_scale)
        return guided + self.scale * sigma * gradient
