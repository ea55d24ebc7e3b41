"""Networks of known answers, for tests of samplers."""

import torch
from diffusers import DDIMScheduler

from tokenlearn.diffusion import DiscreteProcess
from tokenlearn.guidance import ClassifierFreeGuidance, GuidanceRule, GuidedModel
from tokenlearn.models import Conditioning

DDIM = DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
PROCESS = DiscreteProcess(DDIM.alphas_cumprod, "noise")
SPREAD = 0.5
UNGUIDED = ClassifierFreeGuidance(1.0)


class FunctionNetwork:
    """A function of latents, timestep and conditioning as a network on DDIM's noise levels."""

    def __init__(self, function, process=PROCESS):
        self.function, self.process = function, process

    def __call__(self, latents, timesteps, conditioning):
        return self.function(latents, timesteps, conditioning)


class Recorder:
    """A network that notes how many rows each call has, and whether for a gradient."""

    def __init__(self, network):
        self.network, self.process = network, network.process
        self.calls = []

    def __call__(self, latents, timesteps, conditioning):
        self.calls.append((len(latents), torch.is_grad_enabled()))
        return self.network(latents, timesteps, conditioning)


class FunctionRule(GuidanceRule):
    """A function of predictions and step as a rule; it notes the steps."""

    def __init__(self, function):
        self.function, self.steps = function, []

    def __call__(self, predictions, step):
        self.steps.append(step)
        return self.function(predictions, step)


def conditioning(*means):
    return Conditioning(torch.tensor(means).reshape(-1, 1, 1))


def constant(conditioning):
    """The same conditioning without its history."""
    pooled = conditioning.pooled_prompt_embeds
    return Conditioning(conditioning.prompt_embeds.detach(), None if pooled is None else pooled.detach())


EMPTY = conditioning(0.0)


def gaussian(latents, timestep, conditioning):
    """The best prediction of noise where images are normal with deviation SPREAD about the conditioning."""
    alpha_squared = DDIM.alphas_cumprod[timestep]
    mean = alpha_squared.sqrt() * conditioning.prompt_embeds.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)
    variance = alpha_squared * SPREAD**2 + 1 - alpha_squared
    return (1 - alpha_squared).sqrt() / variance * (latents - mean)


def guided(function, conditionings, rule=UNGUIDED):
    """A function as a guided model."""
    return GuidedModel(FunctionNetwork(function), rule, conditionings)
