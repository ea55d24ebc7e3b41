"""Stable Diffusion 1.x and 2.x, and every other pipeline of their layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor, nn

from tokenlearn.errors import UserError
from tokenlearn.models.backbone import Conditioning, DiffusionBackbone, pool_at_end_of_text
from tokenlearn.models.frozen import freeze

_WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


class StableDiffusion(DiffusionBackbone):
    """A pipeline that diffusers' ``StableDiffusionPipeline`` loads, frozen, for noise, velocity or x0 prediction.

    The VAE stays in float32 whatever ``dtype`` says, because in half precision its activations overflow on some images
    and its gradients lose the little that classifiers send back; only an autocast of the caller changes that.

    Args:
        pretrained: hub id or folder. The safety checker is not loaded.
        revision: branch, tag or commit of the hub repository.
        variant: variant of the weight files, such as ``fp16``.
        dtype: precision of the network and the text encoder.
        gradient_checkpointing: recompute activations inside of the network and the VAE in the backward pass; less
            memory, about a third more time.
        compile: compile the network with ``torch.compile`` on first use.

    Raises:
        UserError: if the folder or one of its files is missing or unreadable, or the hub cannot provide the model.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        variant: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        pipeline: Any = _load_pipeline(pretrained, revision, variant)
        unet_config, vae_config = pipeline.unet.config, pipeline.vae.config
        size = unet_config.sample_size
        super().__init__(
            pretrained=pretrained,
            scheduler=pipeline.scheduler,
            tokenizers=[pipeline.tokenizer],
            text_encoders=[pipeline.text_encoder],
            max_prompt_length=min(
                pipeline.tokenizer.model_max_length, pipeline.text_encoder.config.max_position_embeddings
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
        self.vae.float()
        self._scaling = float(vae_config.scaling_factor)
        self._shift = float(vae_config.get("shift_factor") or 0.0)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.vae.enable_gradient_checkpointing()
        freeze(self)
        if compile:
            self.unet.compile()  # in place, so that the names of the parameters stay

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See :meth:`DiffusionBackbone.encode_prompts`; the pooled row is the state at the true end of the text."""
        ids = self.tokenize(prompts)
        learned = not self.learned_ids().isdisjoint(ids.flatten().tolist())
        ids = ids.to(self.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and learned):
            states = self.text_encoders[0](ids).last_hidden_state.float()
        end_of_text = self.tokenizers[0].eos_token_id
        assert isinstance(end_of_text, int)
        return Conditioning(states, pool_at_end_of_text(states, ids, end_of_text))

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See :meth:`DiffusionBackbone.forward`."""
        dtype = self.unet.dtype
        prompt_embeds = conditioning.prompt_embeds.to(dtype)
        output: Tensor = self.unet(latents.to(dtype), timesteps, prompt_embeds, return_dict=False)[0]
        return output.float()

    def encode_images(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """See :meth:`DiffusionBackbone.encode_images`."""
        posterior = self.vae.encode(2 * images - 1).latent_dist
        latents: Tensor = posterior.sample(generator) if sample else posterior.mode()
        return (latents.float() - self._shift) * self._scaling

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See :meth:`DiffusionBackbone.decode_latents`."""
        decoded: Tensor = self.vae.decode(latents / self._scaling + self._shift, return_dict=False)[0]
        return decoded.float() / 2 + 0.5


def _load_pipeline(pretrained: str, revision: str | None, variant: str | None) -> Any:  # noqa: ANN401
    """Load all components in float32, or raise a UserError that says what to do."""
    local = Path(pretrained).expanduser().is_dir()
    source = str(Path(pretrained).expanduser()) if local else pretrained
    if local:
        _check_folder(Path(source), variant)
    elif pretrained.startswith((".", "/", "~")) or pretrained.count("/") != 1:
        # Some old hub ids have no slash, but all models of this layout that still load have an owner.
        raise UserError(
            f"model folder '{pretrained}' does not exist; give an existing folder or a hub id (owner/name)"
        )
    pipeline_class: Any = StableDiffusionPipeline
    try:
        return pipeline_class.from_pretrained(
            source,
            revision=revision,
            variant=variant,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            low_cpu_mem_usage=False,  # anything else needs accelerate
        )
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        if local:
            raise UserError(f"cannot load the model in '{pretrained}' ({reason}); download it again") from error
        raise UserError(
            f"model '{pretrained}' is neither a folder nor can it be had from the hub ({reason}); check its name and "
            "the network, or give a local folder"
        ) from error


def _check_folder(folder: Path, variant: str | None) -> None:
    """Raise a UserError that names the first file missing from a folder of Stable Diffusion's layout."""
    # diffusers takes the plain file of a component that has none of the variant.
    tails = [f".{variant}", ""] if variant else [""]
    for name in ("model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in _WEIGHTS)):
        if not (folder / name).is_file():
            raise _missing(folder, name)
    if not any((folder / "tokenizer" / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise _missing(folder, "tokenizer/vocab.json")
    for part, stem in _WEIGHTS.items():
        stems = [stem, "pytorch_model"] if part == "text_encoder" else [stem]
        files = [f"{stem}{tail}{suffix}" for stem in stems for tail in tails for suffix in (".safetensors", ".bin")]
        indices = [f"{stem}.safetensors.index{tail}.json" for tail in tails]
        if any((folder / part / name).is_file() for name in files):
            continue
        index = next((folder / part / name for name in indices if (folder / part / name).is_file()), None)
        if index is None:
            raise _missing(folder, f"{part}/{files[0]}")
        for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            if not (folder / part / shard).is_file():
                raise _missing(folder, f"{part}/{shard}")


def _missing(folder: Path, name: str) -> UserError:
    return UserError(f"model folder '{folder}' is incomplete: no '{name}'; download or export the model again")
