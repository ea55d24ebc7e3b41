"""Base of all Stable Diffusion adapters: a UNet that works on the latents of a VAE."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tokenlearn.diffusion.process import DiscreteProcess, Kind
from tokenlearn.errors import UserError
from tokenlearn.models.backbones.base import DiffusionBackbone
from tokenlearn.models.backbones.conditioning import Conditioning
from tokenlearn.models.backbones.prefix_cache import PrefixCache
from tokenlearn.models.frozen import Precision, freeze

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SLICE_PIXELS = 512 * 512
"""Pixels that the VAE takes at once: an image of 512x512, or many small ones. Its activations grow with them."""

_FEWEST_UNITS = 2  # begin and end of a prompt

_KINDS: dict[str, Kind] = {"epsilon": "noise", "v_prediction": "velocity", "sample": "x0"}


def ddpm_process(scheduler: Any, pretrained: str) -> DiscreteProcess:  # noqa: ANN401 - schedulers share no base class
    """The noise process of a network that was trained as a DDPM, which the pipeline's scheduler states in full.

    Raises:
        UserError: if the scheduler states no such process, as a flow-matching scheduler does.
    """
    from diffusers import DDPMScheduler

    config = scheduler.config
    # Where a file states no schedule, the default of diffusers is that of no model of this family.
    for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type"):
        if key not in config or (key == "beta_schedule" and key in config.get("_use_default_values", ())):
            raise UserError(
                f"the {type(scheduler).__name__} of '{pretrained}' states no '{key}', so the model is of another "
                "family; choose another model.backbone.class_path"
            )
    if (prediction := config["prediction_type"]) not in _KINDS:
        raise UserError(
            f"the network of '{pretrained}' predicts '{prediction}', not {', '.join(_KINDS)}; give another model"
        )
    # Not every scheduler keeps alphas_cumprod as in training (Euler's are changed for zero terminal SNR).
    schedule_class: Any = DDPMScheduler
    alphas_cumprod = schedule_class.from_config(config).alphas_cumprod
    if not alphas_cumprod.isfinite().all():
        raise UserError(
            f"the scheduler of '{pretrained}' has noise levels that are not finite (beta_start "
            f"{config['beta_start']}, beta_end {config['beta_end']}); download the model again"
        )
    return DiscreteProcess(alphas_cumprod, _KINDS[prediction])


def _check_shapes(pretrained: str, pipeline: Any) -> None:  # noqa: ANN401 - as above
    """Refuse a network that takes more than noisy latents, a timestep and a prompt, or other ones than are made here.

    Raises:
        UserError: naming what the network takes.
    """
    network, vae = pipeline.unet.config, pipeline.vae.config
    channels = vae.get("latent_channels")
    if {network.get("in_channels"), network.get("out_channels")} != {channels}:
        kind = {9: " as for inpainting", 8: " as of instruct-pix2pix", 5: " as with depth"}
        raise UserError(
            f"the network of '{pretrained}' takes {network.get('in_channels')} channels"
            f"{kind.get(network.get('in_channels'), '')} and gives {network.get('out_channels')}, its VAE has "
            f"{channels}; give a text-to-image model"
        )
    if network.get("time_cond_proj_dim") is not None:
        raise UserError(
            f"the network of '{pretrained}' is distilled to take the guidance scale as an input (time_cond_proj_dim "
            f"{network['time_cond_proj_dim']}), which is not supported; give the model that it was distilled from"
        )
    encoders = (getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2"))
    width = sum(encoder.config.hidden_size for encoder in encoders if encoder is not None)
    expected = network.get("cross_attention_dim")
    if network.get("encoder_hid_dim") is None and set(expected if isinstance(expected, list) else [expected]) != {
        width
    }:
        raise UserError(
            f"the network of '{pretrained}' takes prompts of width {expected}, its text encoders give {width}; "
            "download the model again, or give another"
        )
    if not isinstance(network.get("sample_size"), int | list | tuple):
        raise UserError(f"the network of '{pretrained}' has no sample_size; set it in the config.json of the unet")
    for name, value in (
        ("scaling_factor", vae.get("scaling_factor")),
        ("shift_factor", vae.get("shift_factor") or 0.0),
    ):
        number = isinstance(value, int | float) and math.isfinite(value)
        if not number or (name == "scaling_factor" and value <= 0):
            raise UserError(
                f"the VAE of '{pretrained}' has the {name} {value!r}, not a finite number"
                f"{' above 0' if name == 'scaling_factor' else ''}; correct it in the config.json of the vae"
            )
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise UserError(
            f"the VAE of '{pretrained}' states mean and deviation of its latents, which are not used here; give a "
            "model whose VAE states a scaling_factor alone"
        )


class LatentDiffusion(DiffusionBackbone):
    """A UNet and a VAE of diffusers, frozen. An adapter adds :meth:`_encode`.

    Args:
        pretrained: hub id or folder, as the user gave it.
        pipeline: the pipeline loaded from there.
        tokenizers: one per text encoder.
        text_encoders: the pipeline's text encoders.
        dtype: precision of the network and the text encoders.
        gradient_checkpointing: recompute activations inside of the network and the VAE in the backward pass; less
            memory, about a third more time.
        compile: compile the network with ``torch.compile`` on first use.

    Attributes:
        addition_embed_type: input of the network besides the prompt's states, by diffusers' name for it.

    Raises:
        UserError: if the network takes another one.
    """

    addition_embed_type: ClassVar[str | None] = None
    clip_sample = False

    def __init__(
        self,
        *,
        pretrained: str,
        pipeline: Any,  # noqa: ANN401 - diffusers' pipelines have no usable types
        tokenizers: Sequence[PreTrainedTokenizerBase],
        text_encoders: Sequence[Any],
        dtype: Precision,
        gradient_checkpointing: bool,
        compile: bool,
    ) -> None:
        unet_config, vae_config = pipeline.unet.config, pipeline.vae.config
        if unet_config.addition_embed_type != self.addition_embed_type:
            raise UserError(
                f"the network of '{pretrained}' is of another family than {type(self).__name__}; choose another "
                "model.backbone.class_path"
            )
        _check_shapes(pretrained, pipeline)
        size = unet_config.sample_size
        lengths = [tokenizer.model_max_length for tokenizer in tokenizers]
        if not all(isinstance(length, int) and length > _FEWEST_UNITS for length in lengths):
            raise UserError(
                f"the tokenizers of '{pretrained}' take {lengths} units at most, begin and end included; correct "
                f"model_max_length in tokenizer_config.json to a whole number above {_FEWEST_UNITS}, such as 77"
            )
        super().__init__(
            pretrained=pretrained,
            process=ddpm_process(pipeline.scheduler, pretrained),
            scheduler=pipeline.scheduler,
            tokenizers=tokenizers,
            text_encoders=text_encoders,
            max_prompt_length=min(
                *lengths,
                *(encoder.config.max_position_embeddings for encoder in text_encoders),
            ),
            latent_channels=vae_config.latent_channels,
            latent_size=size if isinstance(size, int) else size[0],
            vae_scale_factor=2 ** (len(vae_config.block_out_channels) - 1),
        )
        self.unet: Any = pipeline.unet
        self.vae: Any = pipeline.vae
        # Not the network's own `to`: it warns of parts to be kept in float32, of which this family has none. Nor the
        # loader's argument, whose name is `torch_dtype` or `dtype` by the version of diffusers.
        nn.Module.to(self.unet, getattr(torch, dtype))
        self.text_encoders.to(getattr(torch, dtype))
        # In half precision the VAE overflows on some images, and loses the small gradients of classifiers.
        self.vae.float()
        self._scaling = float(vae_config.scaling_factor)
        self._shift = float(vae_config.get("shift_factor") or 0.0)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.vae.enable_gradient_checkpointing()
        freeze(self)
        if compile:
            self.unet.compile()  # in place, so that the names of the parameters stay
        # Not where the embedding of the timestep depends on the prompt. Recomputation would miss the copies, and
        # compilation would break at the hooks.
        self.takes_shared_latents = not (self.addition_embed_type or gradient_checkpointing or compile)
        self._prefix = PrefixCache(self.unet) if self.takes_shared_latents else None

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See :meth:`DiffusionBackbone.forward`."""
        dtype = self.unet.dtype
        copies = len(conditioning) // len(latents)
        with self._prefix.copies(copies) if self._prefix else nullcontext():
            output: Tensor = self.unet(
                latents.to(dtype).repeat(copies, 1, 1, 1),
                timesteps if timesteps.ndim == 0 else timesteps.repeat(copies),
                conditioning.prompt_embeds.to(dtype),
                added_cond_kwargs=self.added_conditions(conditioning),
                return_dict=False,
            )[0]
        return output.float()

    @contextmanager
    def same_latents(self) -> Iterator[None]:
        """See :meth:`DiffusionBackbone.same_latents`."""
        with self._prefix.cache() if self._prefix else nullcontext():
            yield

    def added_conditions(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        """Inputs of the network besides the prompt's states, by its names for them."""
        return None

    def encode_images(self, images: Tensor) -> Tensor:
        """See :meth:`DiffusionBackbone.encode_images`."""
        parts = [self.vae.encode(2 * part - 1).latent_dist.mode().float() for part in _slices(images, 1)]
        return (torch.cat(parts) - self._shift) * self._scaling

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See :meth:`DiffusionBackbone.decode_latents`."""
        slices = _slices(latents / self._scaling + self._shift, self.vae_scale_factor)
        parts = [self.vae.decode(part, return_dict=False)[0].float() for part in slices]
        return torch.cat(parts) / 2 + 0.5


def _slices(tensor: Tensor, pixels_per_side: int) -> Sequence[Tensor]:
    """Parts of a batch (B, C, h, w) that the VAE takes one after another; an element has so many pixels a side."""
    pixels = tensor.shape[-2] * tensor.shape[-1] * pixels_per_side**2
    return torch.split(tensor, max(1, _SLICE_PIXELS // pixels))
