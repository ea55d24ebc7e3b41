"""The contract between diffusion models and everything that uses them."""

from __future__ import annotations

import difflib
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tokenlearn.diffusion.process import Process
from tokenlearn.diffusion.solvers import GridSolver, ReversibleSolver, SchedulerSolver, Solver
from tokenlearn.errors import UserError, check_unicode, reason_of
from tokenlearn.models.backbones.conditioning import Conditioning
from tokenlearn.models.frozen import FrozenModule, Precision
from tokenlearn.tokens.bank import TokenBank
from tokenlearn.tokens.compatibility import WordTable
from tokenlearn.tokens.files.encoders import encoder_names
from tokenlearn.tokens.injection import (
    PlaceholderVocabulary,
    accept_learned_embeddings,
    input_embedding,
    learned_embeddings,
)
from tokenlearn.tokens.spaces import Space

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DiffusionBackbone(FrozenModule, ABC):
    """A frozen text-to-image diffusion model.

    An adapter for a family of models loads the parts, states the noise process, hands both to this class, and
    implements :meth:`_encode`, :meth:`forward`, :meth:`encode_images` and :meth:`decode_latents`. Any number of tasks
    and threads share one backbone: tokens are arguments of each call.

    Args:
        pretrained: hub id or folder, as the user gave it.
        process: noise process that the network was trained on, with its kind of prediction.
        scheduler: the pipeline's diffusers scheduler, from whose configuration others are made.
        tokenizers: one per text encoder.
        text_encoders: text encoders whose input embeddings take learned tokens.
        max_prompt_length: ids per prompt, begin and end included.
        latent_channels: channels of the latents.
        latent_size: usual height and width of the latents.
        vae_scale_factor: pixels per latent along a side.

    Attributes:
        pretrained, process, tokenizers, text_encoders, max_prompt_length, latent_channels, latent_size,
            vae_scale_factor: as given.
        embedding_widths: width of each text encoder's input embedding.
        takes_shared_latents: whether :meth:`forward` takes several conditionings of the same latents, at less than
            several times the cost.
        clip_sample: whether schedulers clip predicted latents to [-1, 1]; None for what the scheduler's configuration
            says.
    """

    takes_shared_latents = False
    clip_sample: ClassVar[bool | None] = None

    def __init__(
        self,
        *,
        pretrained: str,
        process: Process,
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
        self.process = process
        self.tokenizers = list(tokenizers)
        self.text_encoders = nn.ModuleList(text_encoders)
        self.max_prompt_length = max_prompt_length
        self.latent_channels = latent_channels
        self.latent_size = latent_size
        self.vae_scale_factor = vae_scale_factor
        self.embedding_widths = tuple(input_embedding(encoder).embedding_dim for encoder in text_encoders)
        self._scheduler = _with_fixed_variance(scheduler)
        for encoder in text_encoders:
            accept_learned_embeddings(encoder)
        # Copies of the tokenizers by bank: a cache, since placeholders of a bank never change.
        self._vocabularies: WeakKeyDictionary[TokenBank, PlaceholderVocabulary] = WeakKeyDictionary()

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.process.device

    @property
    def precision(self) -> Precision:
        """Precision of the text encoders' weights, which is that of the network."""
        weights = next(self.text_encoders.parameters())
        return cast(Precision, str(weights.dtype).removeprefix("torch."))

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the text encoders in embedding files, see :data:`tokenlearn.tokens.files.encoders.ENCODERS`.

        An adapter of a family whose encoders their number and widths do not tell overrides this.
        """
        return encoder_names(self.embedding_widths)

    @cached_property
    def word_tables(self) -> tuple[WordTable, ...]:
        """The words of each text encoder, which are never trained."""
        parts = zip(self.encoders, self.tokenizers, self.text_encoders, strict=True)
        return tuple(WordTable(name, tokenizer, encoder) for name, tokenizer, encoder in parts)

    def vocabulary(self, tokens: TokenBank) -> PlaceholderVocabulary:
        """This model's tokenizers with the placeholders of a bank.

        Raises:
            UserError: if a width does not fit its encoder, or see :class:`PlaceholderVocabulary`.
        """
        if (vocabulary := self._vocabularies.get(tokens)) is not None:
            return vocabulary
        for found, expected in zip(tokens.embedding_widths, self.embedding_widths, strict=False):
            if found != expected:
                raise UserError(
                    f"the embedding has width {found}, this backbone's text encoder has {expected}; use one that was "
                    "made for this model family"
                )
        vocabulary = self._vocabularies[tokens] = PlaceholderVocabulary(tokens, self.tokenizers)
        return vocabulary

    def encode_prompts(self, prompts: Sequence[str], tokens: TokenBank | None = None) -> Conditioning:
        """Encode prompts, padded to :attr:`max_prompt_length` in training as in inference.

        Equal prompts of a batch are encoded once. Placeholders of the output space are taken out of the prompts, and
        their vectors added to the states of what is left, as often as each stood there.

        Gradients reach the token bank, unless the caller disables them. A batch without any placeholder gives a
        conditioning that requires no gradient, so encode the empty prompt apart from prompts with placeholders.

        Args:
            prompts: B prompts.
            tokens: bank whose placeholders the prompts may use; None for words alone.

        Returns:
            Conditioning of B rows.

        Raises:
            UserError: if the bank does not fit the model, or a placeholder does not fit into the prompt length. A
                prompt of words that is too long is cut with a warning.
        """
        if tokens is None or not tokens.output_placeholders:
            return self._encode_once(prompts, tokens)
        vocabulary = self.vocabulary(tokens)
        texts, counts = zip(*(vocabulary.without_outputs(prompt) for prompt in prompts), strict=True)
        conditioning = self._encode_once(texts, tokens)
        # Column by column, so that tokens that no prompt has stay out of the graph.
        for placeholder, of_prompts in zip(vocabulary.outputs, zip(*counts, strict=True), strict=True):
            if any(of_prompts):
                vector = torch.cat(tokens.get(placeholder), dim=1)
                weights = torch.tensor(of_prompts, device=vector.device, dtype=vector.dtype)
                conditioning = self.add_to_outputs(conditioning, weights[:, None] * vector, tokens.spaces[placeholder])
        return conditioning

    def _encode_once(self, prompts: Sequence[str], tokens: TokenBank | None) -> Conditioning:
        """Encode equal prompts once."""
        different = list(dict.fromkeys(prompts))
        conditioning = self._encode(different, tokens)
        if len(different) == len(prompts):
            return conditioning
        return conditioning[torch.tensor([different.index(prompt) for prompt in prompts], device=self.device)]

    @property
    def output_widths(self) -> Sequence[int]:
        """Widths of the parts of the prompts' states, one for each text encoder, side by side."""
        return self.embedding_widths

    def output_mask(self, length: int, space: Space) -> Tensor:
        """Where the vectors of a space are added: (L, D) of 1 and 0 over positions and the widths of all encoders.

        Args:
            length: L, number of positions.
            space: ``output``, or ``output_content``, which leaves out an encoder's begin of the text.

        Raises:
            ValueError: for the input space.
        """
        if space == "input":
            raise ValueError("tokens of the input space are not added to outputs")
        mask = torch.ones(length, sum(self.output_widths), device=self.device)
        if space == "output_content":
            parts = torch.split(mask, list(self.output_widths), dim=1)
            for tokenizer, part in zip(self.tokenizers, parts, strict=True):
                if tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
                    part[0] = 0
        return mask

    def add_to_outputs(self, conditioning: Conditioning, vectors: Tensor, space: Space) -> Conditioning:
        """A conditioning with vectors added to the prompts' states; pooled states stay as they are.

        Args:
            conditioning: B rows.
            vectors: (B, D) or (1, D), the widths of all encoders side by side.
            space: see :meth:`output_mask`.

        Raises:
            UserError: if the states have another width than the encoders side by side.
        """
        states = conditioning.prompt_embeds
        if vectors.shape[-1] != states.shape[-1]:
            raise UserError(
                f"a token of the output space has width {vectors.shape[-1]}, the states of a prompt of "
                f"'{self.pretrained}' have {states.shape[-1]}; use a token of the input space"
            )
        mask = self.output_mask(states.shape[1], space)
        return replace(conditioning, prompt_embeds=states + vectors[:, None].to(states) * mask)

    @abstractmethod
    def _encode(self, prompts: Sequence[str], tokens: TokenBank | None) -> Conditioning:
        """See :meth:`encode_prompts`; all prompts are different."""

    def run_text_encoder(
        self,
        ids: Tensor,
        tokens: TokenBank | None,
        encoder_index: int = 0,
        **options: Any,  # noqa: ANN401 - arguments of whatever the encoder is
    ) -> Any:  # noqa: ANN401
        """Output of a text encoder, with a graph only where a prompt has a placeholder.

        Args:
            ids: (B, L) on any device, see :meth:`tokenize`.
            tokens: bank whose placeholders the ids may stand for.
            encoder_index: which text encoder.
            options: further arguments of the encoder.
        """
        ids, encoder = ids.to(self.device), self.text_encoders[encoder_index]
        rows = None if tokens is None else self.vocabulary(tokens).rows(ids, encoder_index)
        if tokens is None or rows is None or not (rows >= 0).any():
            with torch.no_grad():
                return encoder(ids, **options)
        with learned_embeddings(rows, tokens.vectors[encoder_index]):
            return encoder(ids.masked_fill(rows >= 0, 0), **options)

    @abstractmethod
    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Evaluate the network.

        Args:
            latents: (B, C, h, w).
            timesteps: () or (B,), as schedulers give them.
            conditioning: B rows; where :attr:`takes_shared_latents`, also n B rows, B for each of n prompts.

        Returns:
            Float32 prediction of the process's kind for each row of the conditioning, (B, C, h, w) or
            (n B, C, h, w), whatever the network's precision.
        """

    @contextmanager
    def same_latents(self) -> Iterator[None]:
        """While all evaluations are at the same latents and timesteps, for prompts that cannot go in one call.

        What comes before the prompt in the network is then computed by the first of them alone.
        """
        yield

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images, differentiably; of an autoencoder's posterior, the mean.

        Args:
            images: (B, 3, H, W) in [0, 1], sides divisible by :attr:`vae_scale_factor`.

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
        return self.process.noise(latents, self(latents, timesteps, conditioning), timesteps)

    def predict_x0(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """One-step prediction (B, C, h, w) of the clean latents; arguments as in :meth:`forward`."""
        return self.process.x0(latents, self(latents, timesteps, conditioning), timesteps)

    def make_scheduler(self, name: str | None = None, steps: int | None = None) -> Any:  # noqa: ANN401
        """Make a scheduler for this model from the configuration of the pipeline's scheduler.

        Args:
            name: diffusers class with or without ``Scheduler`` or ``DiscreteScheduler`` at the end, such as ``DDIM``,
                ``DPMSolverMultistep`` or ``Euler``; None for the pipeline's class.
            steps: number of steps planned, only checked here; the sampler sets the timesteps.

        Returns:
            A new diffusers scheduler.

        Raises:
            UserError: if no compatible scheduler has the name, or the number of steps is not possible.
        """
        most = self.process.num_timesteps
        if steps is not None and not 1 <= steps <= most:
            raise UserError(f"sampling.steps must be from 1 to {most}, got {steps}")
        config = self._scheduler.config
        pipeline_class = type(self._scheduler)
        if name is None:
            return pipeline_class.from_config(config, **self._scheduler_options(pipeline_class))
        classes = {cls.__name__.casefold(): cls for cls in self._scheduler_classes()}
        for suffix in ("", "Scheduler", "DiscreteScheduler"):
            if found := classes.get((name + suffix).casefold()):
                return found.from_config(config, **self._scheduler_options(found))
        names = sorted(cls.__name__.removesuffix("Scheduler") for cls in classes.values())
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
        raise UserError(f"no scheduler '{name}' for this model; did you mean {' or '.join(near)}?")

    def _scheduler_classes(self) -> list[Any]:
        """The pipeline's scheduler and those that take its noise levels.

        diffusers leaves the schedulers of distilled models out of those of DDPMs, and counts one of other levels.
        """
        from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler

        pipeline_class = type(self._scheduler)
        ddim: Any = DDIMScheduler
        distilled: tuple[Any, ...] = (LCMScheduler, TCDScheduler)
        found = list(self._scheduler.compatibles)
        if pipeline_class in distilled or ddim in found:
            found = [*ddim._get_compatibles(), *distilled]
        others = (cls for cls in found if cls is not pipeline_class and cls.__name__ != "EDMEulerScheduler")
        return [pipeline_class, *others]

    def _scheduler_options(self, scheduler_class: Any) -> dict[str, bool]:  # noqa: ANN401 - as above
        """What the model was trained for, where the class's default is for another kind of model.

        The configuration of another class lacks the keys, or has the defaults of its class.
        """
        options = {}
        if scheduler_class.__name__ == "PNDMScheduler" and "skip_prk_steps" not in self._scheduler.config:
            options["skip_prk_steps"] = True  # Stable Diffusion's PNDM has no Runge-Kutta start
        if self.clip_sample is not None and "clip_sample" in inspect.signature(scheduler_class.__init__).parameters:
            options["clip_sample"] = self.clip_sample  # latents are not in [-1, 1]
        return options

    def make_solver(self, solver: str | ReversibleSolver | None, steps: int) -> Solver:
        """Bind a solver to this model and to a number of steps.

        Args:
            solver: a scheduler's name, see :meth:`make_scheduler`; a reversible solver, such as :class:`EDICT`; or
                None for the pipeline's scheduler. Where the pipeline's timesteps have the spacing ``linspace``,
                reversible solvers take those of ``leading``.
            steps: sampling steps.

        Raises:
            UserError: see :meth:`make_scheduler`; or if the model's noise levels do not suit a reversible solver.
        """
        if not isinstance(solver, ReversibleSolver):
            name = solver or type(self._scheduler).__name__
            return _scheduler_solver(name, steps, lambda: self.make_scheduler(solver, steps))
        config = self._editing_scheduler(steps).config
        if config.timestep_spacing != "leading":
            raise UserError(
                f"solver {type(solver).__name__} needs the scheduler's timestep_spacing 'leading', not "
                f"'{config.timestep_spacing}'; use a scheduler such as DDIM, and for edits the inversion ddim or "
                "edit_friendly"
            )
        return GridSolver(
            solver,
            self.process,
            steps,
            steps_offset=config.steps_offset,
            set_alpha_to_one=config.set_alpha_to_one,
        )

    def make_editing_solver(self, steps: int) -> SchedulerSolver:
        """DDIM from the noise levels that :meth:`make_inverse_solver` reaches.

        They are the pipeline's, or leading ones where its spacing is ``linspace``: steps of diffusers' DDIM are
        ``N // steps`` timesteps long, which is not the distance of those levels, and its inverse does not know them.

        Raises:
            UserError: see :meth:`make_scheduler`.
        """
        return _scheduler_solver("DDIM", steps, lambda: self._editing_scheduler(steps))

    def make_inverse_solver(self, steps: int) -> SchedulerSolver:
        """DDIM's steps backwards, at the noise levels of :meth:`make_editing_solver` with as many steps."""
        from diffusers import DDIMInverseScheduler

        inverse_class: Any = DDIMInverseScheduler
        return SchedulerSolver(inverse_class.from_config(self._editing_scheduler(steps).config), steps)

    def _editing_scheduler(self, steps: int) -> Any:  # noqa: ANN401 - see make_scheduler
        scheduler = self.make_scheduler("DDIM", steps)
        if scheduler.config.timestep_spacing != "linspace":
            return scheduler
        return type(scheduler).from_config(scheduler.config, timestep_spacing="leading")

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
            near = "x".join(str(max(1, round(side / factor)) * factor) for side in (height, width))
            raise UserError(
                f"image size {height}x{width} is not a multiple of {factor} pixels on each side; take {near}"
            )
        generators = [
            seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed) for seed in seeds
        ]
        shape = (1, self.latent_channels, height // factor, width // factor)
        return torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)

    def tokenize(self, prompts: Sequence[str], tokens: TokenBank | None = None, encoder_index: int = 0) -> Tensor:
        """Ids of prompts, placeholders expanded, padded or cut to :attr:`max_prompt_length`.

        Args:
            prompts: B prompts.
            tokens: bank whose placeholders the prompts may use.
            encoder_index: which tokenizer.

        Returns:
            (B, max_prompt_length) int64 on the CPU.

        Raises:
            UserError: if a prompt has half of a character, or is too long and a placeholder is among the ids to be
                cut.
        """
        for prompt in prompts:
            check_unicode(prompt, "prompt")
        vocabulary = None if tokens is None else self.vocabulary(tokens)
        tokenizer: Any = (self if vocabulary is None else vocabulary).tokenizers[encoder_index]
        expanded = list(prompts) if vocabulary is None else [vocabulary.expand(prompt) for prompt in prompts]
        last = self.max_prompt_length - 1
        rows = tokenizer(expanded, verbose=False).input_ids  # verbose: its own length warning has no remedy
        for index, (prompt, ids) in enumerate(zip(prompts, rows, strict=True)):
            if len(ids) <= self.max_prompt_length:
                continue
            dropped = ids[last:-1]
            if vocabulary is not None and (vocabulary.rows(torch.tensor(dropped), encoder_index) >= 0).any():
                raise UserError(
                    f"prompt '{prompt}' has too many vectors: with its placeholders written out it takes {len(ids)} "
                    f"tokens, this model {self.max_prompt_length}; use fewer vectors per token or a shorter prompt"
                )
            warnings.warn(
                f"prompt '{prompt}' is longer than {self.max_prompt_length} tokens; dropped "
                f"'{tokenizer.decode(dropped).strip()}': shorten it",
                stacklevel=2,
            )
            rows[index] = [*ids[:last], ids[-1]]
        padded = tokenizer.pad(
            {"input_ids": rows}, padding="max_length", max_length=self.max_prompt_length, return_tensors="pt"
        )
        ids_tensor: Tensor = padded.input_ids
        return ids_tensor


def pool_at_end_of_text(states: Tensor, ids: Tensor, eos_token_id: int) -> Tensor:
    """State at the first end-of-text id, where CLIP puts the summary of a prompt.

    The pooled output of ``transformers`` is not used: for the configurations of Stable Diffusion
    (``eos_token_id == 2``) it takes the largest id of a row, whatever that stands for.

    Args:
        states: (B, L, D) states of the last layer.
        ids: (B, L) ids; each row has an end of text, and possibly more of them as padding.
        eos_token_id: id of the end of text, the tokenizer's.

    Returns:
        (B, D) states.
    """
    positions = (ids == eos_token_id).int().argmax(dim=1)
    return states[torch.arange(len(ids), device=ids.device), positions]


_LEARNED_VARIANCES = ("learned", "learned_range")


def _with_fixed_variance(scheduler: Any) -> Any:  # noqa: ANN401 - diffusers' schedulers share no useful base class
    """The same scheduler for predictions without a variance, which no backbone hands on, or has."""
    if scheduler.config.get("variance_type") not in _LEARNED_VARIANCES:
        return scheduler
    # Not as an argument beside the configuration, which classes without a variance type would drop or refuse.
    return type(scheduler).from_config({**scheduler.config, "variance_type": "fixed_small"})


def _scheduler_solver(name: str, steps: int, make: Callable[[], Any]) -> SchedulerSolver:
    """The solver of a scheduler, if the scheduler can make the steps."""
    try:
        solver = SchedulerSolver(make(), steps)
        _ = solver.timesteps  # made here, so that a scheduler refuses before the first image
    except (ArithmeticError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the scheduler {name} cannot make {steps} steps ({reason_of(error)}); change sampling.steps, or set "
            "sampling.solver to another one, such as DDIM"
        ) from error
    return solver
