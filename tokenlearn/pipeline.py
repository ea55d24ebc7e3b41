"""A frozen model, learned tokens and sampling settings: what a notebook uses, and every task."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from PIL import Image
from torch import Tensor

from tokenlearn.diffusion import Gradient, ReversibleSolver, sample
from tokenlearn.errors import MOST_RATIO, UserError, check_at_least
from tokenlearn.guidance import (
    ClassifierFreeGuidance,
    GuidanceRule,
    GuidedModel,
    Trajectory,
    check_tokens,
    sample_trajectory,
)
from tokenlearn.models import Conditioning, DiffusionBackbone
from tokenlearn.paths import resolve
from tokenlearn.quiet import quiet_models
from tokenlearn.tokens import Embeddings, LearnedTokens, TokenBank, load_bank, vocabulary_hash
from tokenlearn.tokens.compatibility import check_vocabularies

if TYPE_CHECKING:
    from typing import Self

    from tokenlearn.image_functions import OptimisedImages
    from tokenlearn.losses.objective import Objective


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampler.

    Attributes:
        steps: sampling steps.
        guidance: guidance rule, or the scale of classifier-free guidance; 1 is none.
        solver: diffusers scheduler by class name, such as ``DDIM`` or ``DPMSolverMultistep``; a reversible solver,
            such as :class:`EDICT`; or null for the pipeline's scheduler.
        negative_prompt: prompt of the unconditional prediction.
        size: (height, width) of images in pixels; null for the size the model was trained for. Images that are edited
            keep their proportions, and get the smaller of both as their shorter side.

    Raises:
        UserError: if there are no steps or pixels, one side is far longer than the other, or the guidance would never
            act in the steps.
    """

    steps: int = 50
    guidance: GuidanceRule | float = 7.5
    solver: ReversibleSolver | str | None = None
    negative_prompt: str = ""
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_at_least("sampling", 1, steps=self.steps, size=None if self.size is None else min(self.size))
        if self.size is not None and max(self.size) > MOST_RATIO * min(self.size):
            raise UserError(
                f"sampling.size {self.size[0]}x{self.size[1]} is out of proportion; one side must be at most "
                f"{MOST_RATIO} times as long as the other"
            )
        self.rule.check_steps(self.steps)

    @property
    def rule(self) -> GuidanceRule:
        """The guidance rule."""
        return self.guidance if isinstance(self.guidance, GuidanceRule) else ClassifierFreeGuidance(self.guidance)


class Pipeline:
    """Prompts with learned tokens to images, by a frozen model.

    Pipelines are values: other tokens or settings are another pipeline on the same backbone, and any number of them
    share it, in threads too.

    Args:
        backbone: frozen diffusion model.
        tokens: bank of the tokens that prompts may use.
        sampling: settings of the sampler.

    Attributes:
        backbone, tokens, sampling: as given.

    Raises:
        UserError: if the tokens do not fit the model.
    """

    def __init__(
        self, backbone: DiffusionBackbone, *, tokens: TokenBank | None = None, sampling: Sampling | None = None
    ) -> None:
        self.backbone, self.tokens, self.sampling = backbone, tokens, sampling or Sampling()
        if tokens is not None:
            backbone.vocabulary(tokens)  # refuses now what would fail at the first prompt
        self._unconditional: Conditioning | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str,
        *,
        tokens: TokenBank | LearnedTokens | Embeddings | None = None,
        sampling: Sampling | None = None,
        check_vocabulary: bool = True,
        **options: Any,  # noqa: ANN401 - settings of the family's adapter
    ) -> Self:
        """Load a model of any family.

        Args:
            pretrained: folder of a diffusers pipeline, or hub id.
            tokens: tokens that prompts may use, see :meth:`with_tokens`.
            sampling: settings of the sampler.
            check_vocabulary: see :meth:`with_tokens`.
            options: settings of the adapter, such as ``dtype="bfloat16"``.

        Raises:
            UserError: if the model cannot be loaded, or is of a family without an adapter.
        """
        pipeline = cls(load_backbone(pretrained, **options), sampling=sampling)
        return pipeline if tokens is None else pipeline.with_tokens(tokens, check_vocabulary=check_vocabulary)

    def with_tokens(self, tokens: TokenBank | LearnedTokens | Embeddings, *, check_vocabulary: bool = True) -> Self:
        """The same pipeline with other tokens.

        Args:
            tokens: learned tokens; or embedding files: a file or a folder, a list of both, or token to file.
            check_vocabulary: whether to say where they were learned beside other words than this model's.

        Raises:
            UserError: if a file cannot be read, or the tokens do not fit the model.
        """
        if isinstance(tokens, LearnedTokens):
            if check_vocabulary:
                check_vocabularies(tokens.metadata.items(), self.backbone.word_tables)
            tokens = tokens.bank
        elif not isinstance(tokens, TokenBank):
            tables = self.backbone.word_tables if check_vocabulary else None
            tokens = load_bank(tokens, self.backbone.embedding_widths, tables)[0]
        return type(self)(self.backbone, tokens=tokens.to(self.backbone.device), sampling=self.sampling)

    def with_sampling(self, **changes: Any) -> Self:  # noqa: ANN401 - fields of Sampling
        """The same pipeline with changed settings of the sampler, named as in :class:`Sampling`."""
        return type(self)(self.backbone, tokens=self.tokens, sampling=dataclasses.replace(self.sampling, **changes))

    @property
    def vocabulary_hash(self) -> str:
        """Fingerprint of the text encoder's vocabulary, which tokens are learned for."""
        return vocabulary_hash(self.backbone.text_encoders[0])

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: Sequence[int] = (0,),
        batch_size: int = 8,
        **changes: Any,  # noqa: ANN401 - fields of Sampling
    ) -> list[Image.Image]:
        """Generate an image of each prompt with each seed.

        Args:
            prompts: prompts, with tokens if wanted.
            seeds: seeds of the initial latents, the same as ``torch.Generator().manual_seed(seed)`` in diffusers.
            batch_size: images at once.
            changes: settings of the sampler for this call, named as in :class:`Sampling`, such as
                ``guidance=SEGA(["glasses"])``.

        Returns:
            Images, all seeds of the first prompt first.

        Raises:
            UserError: for an unknown scheduler, a size that the model cannot make, or images that are not finite.
        """
        pipeline = self.with_sampling(**changes) if changes else self
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        pipeline.check_prompts(given)  # before the first image, not at the prompt itself
        samples = [(prompt, seed) for prompt in given for seed in seeds]
        images: list[Image.Image] = []
        for start in range(0, len(samples), batch_size):
            batch_prompts, batch_seeds = zip(*samples[start : start + batch_size], strict=True)
            images += to_images(pipeline.generate(batch_prompts, batch_seeds))
        return images

    @overload
    def edit(
        self,
        image: Image.Image | str | Path,
        edit: Mapping[str, float] | GuidanceRule,
        **settings: Any,  # noqa: ANN401 - keywords of edit_images
    ) -> Image.Image: ...

    @overload
    def edit(
        self,
        image: list[Image.Image] | list[str] | list[Path] | None,
        edit: Mapping[str, float] | GuidanceRule,
        **settings: Any,  # noqa: ANN401 - keywords of edit_images
    ) -> list[Image.Image]: ...

    def edit(
        self,
        image: Image.Image | str | Path | list[Image.Image] | list[str] | list[Path] | None,
        edit: Mapping[str, float] | GuidanceRule,
        **settings: Any,
    ) -> Image.Image | list[Image.Image]:
        """Edit an image by learned tokens, words or a guidance rule.

        Args:
            image: an image or its file; a list of these; or None to generate images of ``prompts`` and ``seeds``.
            edit: token or words to signed scale, such as ``{"<smile>": 3, "<glasses>": -1}``; or a guidance rule.
            settings: see :func:`tokenlearn.image_functions.edit_images`, such as ``inversion="edit_friendly"``.

        Returns:
            The edited image at its size, or a list of edited images.

        Raises:
            UserError: if an image cannot be read, or a setting is out of range.
        """
        from tokenlearn.image_functions import edit_images

        if isinstance(image, str | Path) and Path(image).expanduser().is_dir():
            raise UserError(f"'{image}' is a folder; give an image, or a list of files")
        edited = edit_images(self, image, edit, **settings)
        return edited[0] if isinstance(image, Image.Image | str | Path) else edited

    def optimise(
        self,
        prompts: str | Sequence[str] = (),
        *,
        objective: Objective | Sequence[Objective],
        **settings: Any,  # noqa: ANN401 - keywords of optimise_latents
    ) -> OptimisedImages:
        """Optimise the latents of images, so that the finished images meet an objective (DOODL).

        Args:
            prompts: images to generate; without prompts, ``images`` are edited.
            objective: loss of finished images.
            settings: see :func:`tokenlearn.image_functions.optimise_latents`, such as ``seeds=[1]`` and ``steps=60``.
        """
        from tokenlearn.image_functions import optimise_latents

        return optimise_latents(self, prompts, objective=objective, **settings)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of B rows for B prompts with this pipeline's tokens, differentiable by these.

        Raises:
            UserError: if a prompt has a token that is not loaded, or the conditioning is constant and not finite.
        """
        self.check_prompts(prompts)
        conditioning = self.backbone.encode_prompts(prompts, self.tokens)
        if not torch.is_grad_enabled() and not conditioning.prompt_embeds.isfinite().all():
            rows = conditioning.prompt_embeds.flatten(1).isfinite().all(dim=1).tolist()
            raise UserError(
                f"the text encoder gives values that are not finite for '{prompts[rows.index(False)]}'; the vectors "
                "of a token in it are too large, or the precision too low: use another embedding file, float32 or "
                "bfloat16"
            )
        return conditioning

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts with tokens that are not loaded.

        Raises:
            UserError: naming the first such token.
        """
        check_tokens(prompts, self.tokens.placeholders if self.tokens is not None else ())

    def unconditional(self) -> Conditioning:
        """One row for the negative prompt, a constant."""
        cached = self._unconditional
        if cached is not None and cached.prompt_embeds.device == self.backbone.device:
            return cached
        with torch.inference_mode(False), torch.no_grad():
            row = self.encode([self.sampling.negative_prompt])
        names = () if self.tokens is None else self.tokens.placeholders
        if not any(name.casefold() in self.sampling.negative_prompt.casefold() for name in names):
            self._unconditional = row  # a token would change as it is learned
        return row

    def guided_model(self, prompt: Conditioning, rule: GuidanceRule | None = None) -> GuidedModel[Conditioning]:
        """The model under a guidance rule.

        Args:
            prompt: conditioning of the prompts, of one row or of as many as the latents.
            rule: guidance rule; None for the settings' rule. Its concept prompts may use this pipeline's tokens.

        Raises:
            UserError: if a concept prompt has a token that is not loaded.
        """
        rule = rule or self.sampling.rule
        concepts = [self.encode([concept]) for concept in rule.concept_prompts]
        return GuidedModel(self.backbone, rule, rule.conditionings(self.unconditional(), prompt, *concepts))

    def sample_latents(
        self,
        seeds: Sequence[int],
        model: GuidedModel[Conditioning],
        *,
        gradient: Gradient | None = None,
        steps: int | None = None,
        solver: str | ReversibleSolver | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) of B seeds by a guided model.

        Args:
            seeds: seeds of the initial latents, and of noise that a scheduler adds.
            model: guided model, see :meth:`guided_model`.
            gradient: how the gradient goes back; None for none.
            steps: sampling steps; None for the settings' steps.
            solver: None for the settings' solver.

        Raises:
            UserError: if there are fewer than 1 steps.
        """
        latents, start = self._start(seeds, steps, solver)
        return sample(model, latents, gradient=gradient, **start)

    def _start(
        self, seeds: Sequence[int], steps: int | None, solver: str | ReversibleSolver | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Initial latents (B, C, h, w), and the solver and generators that sampling goes on with."""
        steps = self.sampling.steps if steps is None else steps
        check_at_least("pipeline", 1, steps=steps)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        latents = self.backbone.initial_latents(generators, self.sampling.size)
        made = self.backbone.make_solver(solver or self.sampling.solver, steps)
        return latents, {"solver": made, "generators": generators}

    def sample_trajectory(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        solver: str | ReversibleSolver | None = None,
        share: float = 1.0,
    ) -> Trajectory:
        """Latents on a share of the way to images of B prompts and seeds, without a gradient; ``solver`` as above."""
        with torch.no_grad():
            model = self.guided_model(self.encode(prompts))
        latents, start = self._start(seeds, None, solver)
        return sample_trajectory(model, latents, share=share, **start)

    def generate_latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        rule: GuidanceRule | None = None,
        gradient: Gradient | None = None,
        steps: int | None = None,
        solver: str | ReversibleSolver | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) of B prompts and seeds.

        ``rule`` is as in :meth:`guided_model`, the other arguments as in :meth:`sample_latents`.
        """
        differentiated = torch.is_grad_enabled() and gradient is not None
        # Guidance by an objective takes gradients of its own, which nothing made in inference mode can have.
        with torch.inference_mode(False), torch.set_grad_enabled(differentiated):
            model = self.guided_model(self.encode(prompts), rule)
            return self.sample_latents(seeds, model, gradient=gradient, steps=steps, solver=solver)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        rule: GuidanceRule | None = None,
        gradient: Gradient | None = None,
        steps: int | None = None,
        solver: str | ReversibleSolver | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W), nominally in [0, 1] and not clamped, of B prompts and seeds.

        Arguments as in :meth:`generate_latents`. The gradient reaches the vectors of the tokens.
        """
        latents = self.generate_latents(prompts, seeds, rule=rule, gradient=gradient, steps=steps, solver=solver)
        return self.backbone.decode_latents(latents)


def finished(images: Tensor) -> Tensor:
    """Generated images (B, 3, H, W) clamped to [0, 1], as they are written and judged.

    Raises:
        UserError: if a value is not finite, which would be written as black.
    """
    if not images.isfinite().all():
        raise UserError(
            "the generated images are not finite and would be black; use float32 or bfloat16, lower the guidance "
            "scale, or check the schedule and the weights of the model"
        )
    return images.clamp(0, 1)


def to_images(images: Tensor) -> list[Image.Image]:
    """PIL images of (B, 3, H, W) in [0, 1], rounded as diffusers rounds.

    Raises:
        UserError: if a value is not finite.
    """
    pixels = (finished(images.detach().float()) * 255).round().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in pixels]


def load_backbone(pretrained: str, **options: Any) -> DiffusionBackbone:  # noqa: ANN401 - settings of an adapter
    """Load a model by the adapter of its family.

    Args:
        pretrained: folder of a diffusers pipeline, or hub id.
        options: settings of the adapter.

    Raises:
        UserError: if there is no adapter for the family, or the model cannot be loaded.
    """
    from tokenlearn import models

    family = _pipeline_class(pretrained, options.get("revision"))
    adapters = {
        "StableDiffusionPipeline": "StableDiffusion",
        "StableDiffusionXLPipeline": "StableDiffusionXL",
        "IFPipeline": "DeepFloydIF",
    }
    if family not in adapters:
        raise UserError(
            f"the model '{pretrained}' is a {family}; there are adapters for {', '.join(adapters)}: give another "
            "model, or make the backbone yourself"
        )
    with quiet_models():
        backbone: DiffusionBackbone = getattr(models, adapters[family])(pretrained, **options)
    return backbone


def _pipeline_class(pretrained: str, revision: str | None) -> str:
    """Diffusers class that a pipeline's index names."""
    from tokenlearn.models.backbones.loading import download_index, refuse_single_file

    refuse_single_file(pretrained)
    index = Path(resolve(pretrained)).expanduser() / "model_index.json"
    if not index.is_file():
        index = download_index(pretrained, revision)
    try:
        return str(json.loads(index.read_text())["_class_name"])
    except (ValueError, KeyError, TypeError):  # whatever JSON it is
        raise UserError(f"'{index}' names no pipeline class; download the model again") from None
