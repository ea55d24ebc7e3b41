"""The contract between diffusion models and everything that uses them."""

from __future__ import annotations

import difflib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers import DDPMScheduler, PNDMScheduler
from torch import Tensor, nn

from tokenlearn.diffusion.schedule import PredictionType, convert
from tokenlearn.errors import UserError
from tokenlearn.models.frozen import FrozenModule
from tokenlearn.tokens.bank import TokenBank
from tokenlearn.tokens.injection import TokenInjection, input_embedding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Conditioning:
    """What a network is conditioned on, one row per sample.

    Attributes:
        prompt_embeds: (B, L, D) text encoder states.
        pooled_prompt_embeds: (B, P) state at the end of the text, for networks that use one.
        extra: further (B, ...) inputs by the network's own names, such as SDXL's ``time_ids``.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def requires_grad(self) -> bool:
        """Whether any tensor in it requires a gradient."""
        return any(tensor.requires_grad for tensor in self._tensors())

    def detach(self) -> Conditioning:
        """The same values without their history."""
        return self._map(Tensor.detach)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.prompt_embeds)

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        """Rows chosen by a slice or a (n,) tensor of indices."""
        return self._map(lambda tensor: tensor[rows])

    def expand(self, batch: int) -> Conditioning:
        """One row as ``batch`` rows that share its memory.

        Raises:
            ValueError: if there is more than one row, and not ``batch``.
        """
        if len(self) not in (1, batch):
            raise ValueError(f"cannot expand {len(self)} rows to {batch}")
        return self._map(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    def repeat(self, times: int) -> Conditioning:
        """All rows ``times`` times, as a whole: a b a b."""
        return self.cat([self] * times)

    @staticmethod
    def cat(conditionings: Sequence[Conditioning]) -> Conditioning:
        """Rows of all conditionings, one after another; all must have the same parts."""
        first = conditionings[0]
        pooled = [item.pooled_prompt_embeds for item in conditionings if item.pooled_prompt_embeds is not None]
        if len(pooled) not in (0, len(conditionings)) or any(
            set(item.extra) != set(first.extra) for item in conditionings
        ):
            raise ValueError("conditionings with different parts cannot be put together")
        return Conditioning(
            torch.cat([item.prompt_embeds for item in conditionings]),
            torch.cat(pooled) if pooled else None,
            {name: torch.cat([item.extra[name] for item in conditionings]) for name in first.extra},
        )

    def _tensors(self) -> list[Tensor]:
        pooled = [] if self.pooled_prompt_embeds is None else [self.pooled_prompt_embeds]
        return [self.prompt_embeds, *pooled, *self.extra.values()]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(
            function(self.prompt_embeds),
            None if self.pooled_prompt_embeds is None else function(self.pooled_prompt_embeds),
            {name: function(tensor) for name, tensor in self.extra.items()},
        )


class DiffusionBackbone(FrozenModule, ABC):
    """A frozen text-to-image diffusion model, described by alpha and sigma at each timestep and a kind of prediction.

    An adapter for a family of models loads the parts, hands their description to this class, and implements
    :meth:`_encode`, :meth:`forward`, :meth:`encode_images` and :meth:`decode_latents`.

    Args:
        pretrained: hub id or folder, as the user gave it.
        scheduler: the pipeline's own diffusers scheduler; noise schedule and kind of prediction come from it.
        tokenizers: one per text encoder.
        text_encoders: text encoders whose input embeddings take learned tokens.
        max_prompt_length: ids per prompt, begin and end included.
        latent_channels: channels of the latents.
        latent_size: usual height and width of the latents.
        vae_scale_factor: pixels per latent along a side.

    Attributes:
        pretrained, tokenizers, text_encoders, max_prompt_length, latent_channels, latent_size, vae_scale_factor:
            as given.
        prediction_type: kind of output of :meth:`forward`.
        embedding_widths: width of each text encoder's input embedding.
        alphas: (num_train_timesteps,) factor of the image in the latents, ``sqrt(alpha_bar)``.
        sigmas: (num_train_timesteps,) factor of the noise, ``sqrt(1 - alpha_bar)``.
        takes_shared_latents: whether :meth:`forward` takes several conditionings of the same latents, at less than
            several times the cost.
    """

    alphas: Tensor
    sigmas: Tensor
    prediction_type: PredictionType
    takes_shared_latents = False

    def __init__(
        self,
        *,
        pretrained: str,
        scheduler: Any,  # noqa: ANN401 - diffusers' schedulers share no base class with the methods used
        tokenizers: Sequence[PreTrainedTokenizerBase],
        text_encoders: Sequence[nn.Module],
        max_prompt_length: int,
        latent_channels: int,
        latent_size: int,
        vae_scale_factor: int,
    ) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.tokenizers = list(tokenizers)
        self.text_encoders = nn.ModuleList(text_encoders)
        self.max_prompt_length = max_prompt_length
        self.latent_channels = latent_channels
        self.latent_size = latent_size
        self.vae_scale_factor = vae_scale_factor
        self.embedding_widths = tuple(input_embedding(encoder).embedding_dim for encoder in text_encoders)
        self.prediction_type = scheduler.config.get("prediction_type", "epsilon")
        self._scheduler = scheduler
        self._injection: TokenInjection | None = None
        # Not every scheduler keeps alphas_cumprod as it was trained with (Euler's are changed for zero terminal SNR).
        schedule_class: Any = DDPMScheduler
        alphas_cumprod: Tensor = schedule_class.from_config(scheduler.config).alphas_cumprod
        self.register_buffer("alphas", alphas_cumprod.sqrt().float(), persistent=False)
        self.register_buffer("sigmas", (1 - alphas_cumprod).sqrt().float(), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.alphas.device

    def inject(self, bank: TokenBank) -> None:
        """Make prompts understand the placeholders of ``bank``, instead of those of an earlier one.

        The bank stays outside of this module: who trains it registers it, moves it and saves it.

        Raises:
            UserError: see :class:`tokenlearn.tokens.TokenInjection`; afterwards there is no injection.
        """
        if self._injection is not None:
            self._injection.remove()
            self._injection = None
        self._injection = TokenInjection(bank, self.tokenizers, list(self.text_encoders))

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts, padded to :attr:`max_prompt_length` in training as in inference.

        Those that are the same, as in a batch for few tokens, are encoded once. Gradients reach the injected token
        bank, unless disabled by the caller. Prompts without any placeholder give a conditioning that requires no
        gradient, so encode the empty prompt apart from those with placeholders.

        Args:
            prompts: B prompts, with placeholders of the injected bank if wanted.

        Returns:
            Conditioning of B rows.

        Raises:
            UserError: if a placeholder does not fit into the prompt length. A prompt of words alone that is too long
                is cut with a warning.
        """
        different = list(dict.fromkeys(prompts))
        conditioning = self._encode(different)
        if len(different) == len(prompts):
            return conditioning
        return conditioning[torch.tensor([different.index(prompt) for prompt in prompts], device=self.device)]

    @abstractmethod
    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        """See :meth:`encode_prompts`; all prompts are different."""

    @abstractmethod
    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Evaluate the network.

        Args:
            latents: (B, C, h, w).
            timesteps: () or (B,), as schedulers give them.
            conditioning: B rows; where :attr:`takes_shared_latents`, also n B rows, B for each of n prompts.

        Returns:
            Float32 prediction of the kind :attr:`prediction_type` for each row of the conditioning, (B, C, h, w) or
            (n B, C, h, w), whatever the network's precision.
        """

    @contextmanager
    def same_latents(self) -> Iterator[None]:
        """While all evaluations are at the same latents and timesteps, for prompts that cannot go in one call.

        What comes before the prompt in the network is then computed by the first of them alone.
        """
        yield

    @abstractmethod
    def encode_images(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Encode images, differentiably.

        Args:
            images: (B, 3, H, W) in [0, 1], sides divisible by :attr:`vae_scale_factor`.
            sample: draw from the posterior instead of taking its mean.
            generator: source of randomness of the draw.

        Returns:
            (B, C, h, w) float32 latents, scaled as the network expects them.
        """

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode latents, differentiably.

        Args:
            latents: (B, C, h, w) as the network gives them.

        Returns:
            (B, 3, H, W) float32 images, nominally in [0, 1] but not clamped: a clamp would have no gradient where the
            decoder overshoots, just where a loss should bring it back. Clamp for display and for judging.
        """

    def predict_noise(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Noise prediction (B, C, h, w), whatever the network predicts; arguments as in :meth:`forward`."""
        return self._predict(latents, timesteps, conditioning, "epsilon")

    def predict_x0(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """One-step prediction (B, C, h, w) of the clean latents; arguments as in :meth:`forward`."""
        return self._predict(latents, timesteps, conditioning, "sample")

    def _predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, kind: PredictionType) -> Tensor:
        output = self(latents, timesteps, conditioning)
        index = timesteps.long()
        return convert(output, latents, self.alphas[index], self.sigmas[index], self.prediction_type, kind)

    def make_scheduler(self, name: str | None = None, num_inference_steps: int | None = None) -> Any:  # noqa: ANN401
        """Make a scheduler for this model from the pipeline's own scheduler configuration.

        Args:
            name: diffusers class with or without ``Scheduler`` or ``DiscreteScheduler`` at the end, such as ``DDIM``,
                ``DPMSolverMultistep`` or ``Euler``; None for the pipeline's own class.
            num_inference_steps: number of steps planned, only checked here; the sampler sets the timesteps.

        Returns:
            A new diffusers scheduler.

        Raises:
            UserError: if the name is not that of a compatible scheduler, or the number of steps is not possible.
        """
        most = len(self.alphas)
        if num_inference_steps is not None and not 1 <= num_inference_steps <= most:
            raise UserError(f"num_inference_steps must be from 1 to {most}, got {num_inference_steps}")
        config = self._scheduler.config
        own = type(self._scheduler)
        if name is None:
            return own.from_config(config)
        classes = {cls.__name__.casefold(): cls for cls in (own, *self._scheduler.compatibles)}
        for suffix in ("", "Scheduler", "DiscreteScheduler"):
            if found := classes.get((name + suffix).casefold()):
                # Stable Diffusion's PNDM has no Runge-Kutta start; the configuration of another class does not say so.
                pndm = found is PNDMScheduler and "skip_prk_steps" not in config
                return found.from_config(config, **({"skip_prk_steps": True} if pndm else {}))
        names = sorted(cls.__name__.removesuffix("Scheduler") for cls in classes.values())
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
        raise UserError(f"no scheduler '{name}' for this model; did you mean {' or '.join(near)}?")

    def initial_latents(
        self, seeds: Sequence[int | torch.Generator], height_width: tuple[int, int] | None = None
    ) -> Tensor:
        """Standard normal noise, one CPU generator per sample.

        A batch is thus the same as its samples one by one, on any device, and the same as what a diffusers pipeline
        draws with ``generator=torch.Generator().manual_seed(seed)``.

        Args:
            seeds: B seeds; or B CPU generators, which are advanced, to be handed on to a scheduler that adds noise.
                (New generators of the same seeds would repeat this noise there.)
            height_width: size of the images in pixels; by default the size the model was trained for.

        Returns:
            (B, C, h, w) float32 on the model's device.

        Raises:
            UserError: if a side is not a multiple of :attr:`vae_scale_factor`.
        """
        factor = self.vae_scale_factor
        height, width = height_width or (self.latent_size * factor, self.latent_size * factor)
        if height % factor or width % factor:
            raise UserError(f"image size {height}x{width} is not a multiple of {factor} pixels on each side")
        generators = [
            seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed) for seed in seeds
        ]
        shape = (1, self.latent_channels, height // factor, width // factor)
        return torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)

    def tokenize(self, prompts: Sequence[str], encoder_index: int = 0) -> Tensor:
        """Ids of prompts, placeholders expanded, padded or cut to :attr:`max_prompt_length`.

        Args:
            prompts: B prompts.
            encoder_index: which tokenizer.

        Returns:
            (B, max_prompt_length) int64 on the CPU.

        Raises:
            UserError: if a placeholder is among what must be cut.
        """
        tokenizer: Any = self.tokenizers[encoder_index]
        learned = self.learned_ids(encoder_index)
        expanded = list(prompts) if self._injection is None else [self._injection.expand(prompt) for prompt in prompts]
        last = self.max_prompt_length - 1
        rows = tokenizer(expanded, verbose=False).input_ids  # verbose: its own length warning has no remedy
        for index, (prompt, ids) in enumerate(zip(prompts, rows, strict=True)):
            if len(ids) <= self.max_prompt_length:
                continue
            dropped = ids[last:-1]
            if learned.intersection(dropped):
                raise UserError(
                    f"prompt '{prompt}' has too many vectors: with its placeholders written out it takes {len(ids)} "
                    f"tokens, this model {self.max_prompt_length}; use fewer vectors per token or a shorter prompt"
                )
            warnings.warn(
                f"prompt '{prompt}' is longer than {self.max_prompt_length} tokens; dropped "
                f"'{tokenizer.decode(dropped).strip()}'",
                stacklevel=2,
            )
            rows[index] = [*ids[:last], ids[-1]]
        padded = tokenizer.pad(
            {"input_ids": rows}, padding="max_length", max_length=self.max_prompt_length, return_tensors="pt"
        )
        ids_tensor: Tensor = padded.input_ids
        return ids_tensor

    def learned_ids(self, encoder_index: int = 0) -> set[int]:
        """Ids that stand for vectors of the injected bank, none without one."""
        if self._injection is None:
            return set()
        bank, tokenizer = self._injection.bank, self.tokenizers[encoder_index]
        units = [unit for placeholder in bank.placeholders for unit in bank.unit_names(placeholder)]
        return set(cast(list[int], tokenizer.convert_tokens_to_ids(units)))


def pool_at_end_of_text(states: Tensor, ids: Tensor, eos_token_id: int) -> Tensor:
    """State at the first end-of-text id, where CLIP was trained to put the summary of a prompt.

    The pooled output of ``transformers`` is not used: for the configurations of Stable Diffusion
    (``eos_token_id == 2``) it takes the largest id of a row, and ids of placeholders are larger than that of the end.

    Args:
        states: (B, L, D) states of the last layer.
        ids: (B, L) ids; each row has an end of text, and possibly more of them as padding.
        eos_token_id: id of the end of text, the tokenizer's.

    Returns:
        (B, D) states.
    """
    positions = (ids == eos_token_id).int().argmax(dim=1)
    return states[torch.arange(len(ids), device=ids.device), positions]
