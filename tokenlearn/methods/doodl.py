"""DOODL: direct optimisation of diffusion latents (Wallace et al., ICCV 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import trange  # type: ignore[import-untyped]

from tokenlearn.data.pictures import Picture
from tokenlearn.diffusion import GradientChain, invert_full_chain, sample_full_chain
from tokenlearn.diffusion.latent_optimisation import keep_band_norms, keep_norm, optimisation_step
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.guidance import ClassifierFreeGuidance
from tokenlearn.methods.editing import check_timestep
from tokenlearn.methods.image_guidance import ImageGuidance, is_guide
from tokenlearn.methods.one_step_guidance import OneStepGuidance
from tokenlearn.methods.picture_task import Edited, PictureTask
from tokenlearn.models import Conditioning, DiffusionBackbone, TimmClassifier

KeptNorms = Literal["norm", "bands"]
DoodlMethod = Literal["doodl", "one_step", "best_of", "none"]

_STRIP = "optimisation"
_EVALUATIONS_PER_UPDATE = 4  # per sampling step: two forward, as checkpointed, and a backward pass as dear as two


class Doodl(PictureTask):
    """Optimise the latents that sampling starts from, so that the finished picture suits a loss.

    Every step samples the whole picture, and descends the gradient of the loss through all of sampling
    (https://arxiv.org/abs/2303.13703); neither a prompt nor a weight changes. Defaults are the released code's where
    a model needs no other. Pictures are generated from prompts and seeds, or photographs: these are inverted by an
    exactly invertible chain, without classifier-free guidance, so that step 0 gives them back as the autoencoder does.
    They are settings of this task, so a config of it has no data section, and no setting of the Trainer is needed
    for the gradient.

    Args:
        backbone: frozen diffusion model.
        guidances: losses of the finished picture, see :mod:`tokenlearn.methods.image_guidance`; their weighted sum
            counts.
        source: picture, or folder of pictures of any size in any depth, to edit in place of generated ones.
        prompts: pictures to generate where there is no ``source``: each prompt with each seed.
        seeds: seeds of the initial latents, and of the perturbations.
        embeddings: embedding files of learned tokens. A checkpoint's tokens take their place.
        num_inference_steps: sampling steps of DDIM, or of the chain.
        guidance_scale: classifier-free guidance scale of generated pictures.
        negative_prompt: prompt of the unconditional branch.
        source_prompt: what photographs show; empty for the unconditional model.
        method: ``doodl``; or what to compare it with: ``one_step`` (classifier guidance by one-step predictions during
            sampling), ``best_of`` (of several first latents those whose picture has the lowest loss), ``none``.
        chain: how the gradient goes through sampling, see :data:`tokenlearn.diffusion.full_chain.GradientChain`; null
            for ``checkpointed``, and for photographs ``edict``, whose pair is two copies of the latents: the others
            carry what large steps turn into blobs.
        optimisation_steps: number of updates.
        grad_scale: learning rate; it comes before the clip.
        clip: most that the scaled gradient may be in any element; null for no limit.
        momentum: share of the last update that an update keeps, in [0, 1).
        noise: standard deviation of the perturbation that every update ends with.
        renormalise: what to keep of the first latents: their ``norm`` as published, the norms of their ``bands`` of
            spatial frequencies, which keeps colours in bounds under large steps, or null for nothing, as published for
            photographs.
        optimise_from: timestep of the sampling steps' whose latents are optimised; null for the first. What is before
            it stays as it is, and photographs are inverted up to it: less changes less.
        one_step_scale: strength of ``one_step``.
        candidates: how many first latents ``best_of`` tries; null for as many as cost what ``optimisation_steps`` cost
            ``doodl``.
        strip_images: pictures of the optimisation on a strip, evenly over the steps; 0 for no strip.
        judge: timm name or folder of a classifier that is no guidance; null for none.
        judge_label: the class whose probability the judge is asked for.
        pictures_at_once: generated pictures in a batch.

    Attributes:
        chooses_latents: whether the first latents are free, as ``best_of`` needs them.

    Raises:
        UserError: if there are no pictures or guidances, the judge guides or has no such class, the chain cannot
            invert, or a number is out of range.
    """

    optimises_latents = True

    def __init__(
        self,
        backbone: DiffusionBackbone,
        guidances: list[ImageGuidance],
        source: str | None = None,
        prompts: list[str] = [],  # noqa: B006 - read only; a list is what YAML shows
        seeds: list[int] = [0],  # noqa: B006 - as above
        embeddings: list[str] = [],  # noqa: B006 - as above
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str = "",
        source_prompt: str = "",
        method: DoodlMethod = "doodl",
        chain: GradientChain | None = None,
        optimisation_steps: int = 50,
        grad_scale: float = 1.0,
        clip: float | None = 1e-3,
        momentum: float = 0.9,
        noise: float = 1e-4,
        renormalise: KeptNorms | None = "norm",
        optimise_from: int | None = None,
        one_step_scale: float = 100.0,
        candidates: int | None = None,
        strip_images: int = 5,
        judge: str | None = None,
        judge_label: str | None = None,
        pictures_at_once: int = 1,
    ) -> None:
        if source is None and not prompts:
            raise UserError("set model.prompts, to generate pictures, or model.source, to a picture or a folder")
        super().__init__(
            backbone,
            source,
            prompts if source is None else [],
            seeds,
            embeddings,
            num_inference_steps,
            guidance_scale,
            "DDIM",
            negative_prompt,
            pictures_at_once if source is None else 1,  # photographs have sizes of their own
        )
        if not guidances:
            raise UserError("model.guidances is empty; give one, such as {class_path: SymmetryGuidance}")
        check_at_least("model", 1, optimisation_steps=optimisation_steps, pictures_at_once=pictures_at_once)
        check_at_least("model", 0, noise=noise, strip_images=strip_images)
        self.candidates = _EVALUATIONS_PER_UPDATE * optimisation_steps if candidates is None else candidates
        check_at_least("model", 1, candidates=self.candidates)
        self.chooses_latents = source is None and optimise_from is None
        if method == "best_of" and not self.chooses_latents:
            raise UserError(
                "method 'best_of' chooses among first latents, which photographs and model.optimise_from do not have; "
                "leave these out, or set model.method to another"
            )
        for name, number in {"grad_scale": grad_scale, "one_step_scale": one_step_scale}.items():
            if not math.isfinite(number):
                raise UserError(f"model.{name} must be a finite number, got {number}")
        if clip is not None and not clip > 0:
            raise UserError(f"model.clip must be above 0, got {clip}; set it to null for no limit")
        if not 0 <= momentum < 1:
            raise UserError(f"model.momentum must be at least 0 and less than 1, got {momentum}")
        if source is not None and chain == "checkpointed":
            raise UserError(
                "chain 'checkpointed' cannot invert photographs exactly; set model.chain to edict, leapfrog or o_belm"
            )
        self.chain: GradientChain = chain or ("checkpointed" if source is None else "edict")
        self.guidances = nn.ModuleList(guidances)
        self.method, self.source_prompt, self.optimisation_steps = method, source_prompt, optimisation_steps
        self.grad_scale, self.clip, self.momentum, self.noise = grad_scale, clip, momentum, noise
        self.renormalise, self.one_step_scale = renormalise, one_step_scale
        self.optimise_from = self._known_timestep(optimise_from)
        self.judge, self._judge_class = _judge(judge, judge_label, guidances)

        self.captions, self.edit_names = [method.replace("_", " ")], [method]
        shown = [round(self.optimisation_steps * index / strip_images) for index in range(1, strip_images + 1)]
        self.strip_scales = {_STRIP: sorted(set(shown))} if shown and method == "doodl" else {}
        self._shows_progress = False

    def _known_timestep(self, timestep: int | None) -> int | None:
        """The timestep, or None if it is the first; UserError if it is none of the sampling steps'."""
        self.scheduler.set_timesteps(self.num_inference_steps)
        known: list[int] = self.scheduler.timesteps.tolist()
        if timestep is not None:
            check_timestep(timestep, known, "model.optimise_from")
        return None if timestep == known[0] else timestep

    def on_predict_start(self) -> None:
        """Show the steps where the Trainer shows progress at all."""
        self._shows_progress = self.trainer.progress_bar_callback is not None and self.global_rank == 0

    @staticmethod
    def strip_label(scale: float) -> str:
        """What stands above a picture of a strip."""
        return f"step {scale:g}"

    def loss(self, images: Tensor, step: int) -> Tensor:
        """Weighted sum (B,) of the guidances' losses of images (B, 3, H, W), nominally in [0, 1]."""
        losses: Tensor = sum(guidance(images, step) for guidance in self.guidances)
        return losses

    def edit_pictures(self, pictures: Sequence[Picture]) -> list[Edited]:
        """Optimise pictures of one size together, each for itself, by the task's method."""
        edited = self.edited_by(self.method, pictures)
        if self.method != "one_step":
            return edited
        return [
            guided._replace(before=plain.before, history=[*plain.history, *guided.history])
            for plain, guided in zip(self.edited_by("none", pictures), edited, strict=True)
        ]

    def edited_by(self, method: DoodlMethod, pictures: Sequence[Picture]) -> list[Edited]:
        """The same by any method; strips are the task's own method's alone.

        Args:
            method: ``best_of`` only where the task :attr:`chooses_latents`. ``one_step`` needs no picture without
                guidance and draws none, so that generated pictures' ``before`` is what comes out.
            pictures: of one size.

        Raises:
            UserError: if a loss is not finite; the files of pictures that are finished stay.
        """
        if not pictures:
            return []
        # Predictions are made in inference mode, in which nothing can have a gradient, not even later.
        with torch.inference_mode(False), torch.no_grad():
            generators = [torch.Generator().manual_seed(picture.seed) for picture in pictures]
            if pictures[0].image is None:
                prompt = self.backbone.encode_prompts([picture.prompt for picture in pictures])
                rule, latents = self.guidance, self.backbone.initial_latents(generators)
                if self.optimise_from is not None:
                    latents = self._sample(self.backbone, latents, prompt, rule, None, self.optimise_from)
            else:
                prompt, rule = self.backbone.encode_prompts([self.source_prompt]), ClassifierFreeGuidance(1.0)
                clean = self.backbone.encode_images(torch.cat([_image(picture) for picture in pictures]).clone())
                latents = invert_full_chain(
                    self.backbone,
                    self.scheduler,
                    clean,
                    [prompt],
                    rule,
                    self.num_inference_steps,
                    self.chain,
                    self.optimise_from,
                )
            if method == "best_of":
                return self._best_of(pictures, latents, prompt, rule, generators)
            if method == "one_step":
                return self._guided_step_by_step(pictures, latents, prompt, rule)
            return self._optimise(pictures, latents, prompt, rule, generators, method)

    def _sample(
        self,
        model: DiffusionBackbone | OneStepGuidance,
        latents: Tensor,
        prompt: Conditioning,
        rule: ClassifierFreeGuidance,
        from_timestep: int | None,
        to_timestep: int | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) at the end, or at a noise level."""
        return sample_full_chain(
            model,
            self.scheduler,
            latents,
            rule.conditionings(self.unconditional(), prompt),
            rule,
            self.num_inference_steps,
            self.chain,
            from_timestep,
            to_timestep,
        )

    def _optimise(
        self,
        pictures: Sequence[Picture],
        latents: Tensor,
        prompt: Conditioning,
        rule: ClassifierFreeGuidance,
        generators: Sequence[torch.Generator],
        method: DoodlMethod,
    ) -> list[Edited]:
        """Pictures and their optimisation from (B, C, h, w) latents, or pairs (B, 2, C, h, w) of photographs."""
        updates = self.optimisation_steps if method == "doodl" else 0
        strip_scales = self.strip_scales if method == self.method else {}
        shown = {0, updates, *strip_scales.get(_STRIP, ())}
        images: dict[int, Tensor] = {}
        histories: list[list[dict[str, float]]] = [[] for _ in pictures]
        keep = {"norm": keep_norm, "bands": keep_band_norms}
        renormalise = None if self.renormalise is None else keep[self.renormalise](latents)
        buffer = torch.zeros_like(latents)

        def record(step: int, image: Tensor, losses: Tensor) -> None:
            self._record(histories, pictures, step, image, losses)
            if step in shown:
                images[step] = image.clamp(0, 1).cpu()

        steps = self._progress(updates + 1, pictures)
        for step in steps:
            last = step == updates
            with torch.set_grad_enabled(not last):
                latents = latents.detach().requires_grad_(not last)
                image = self.backbone.decode_latents(
                    self._sample(self.backbone, latents, prompt, rule, self.optimise_from)
                )
                losses = self.loss(image, step)
            record(step, image.detach(), losses.detach())
            steps.set_postfix(loss=f"{losses.detach().mean().item():.4f}")
            if not last:
                (gradient,) = torch.autograd.grad(losses, latents, torch.ones_like(losses))
                latents, buffer = optimisation_step(
                    latents.detach(),
                    gradient,
                    buffer,
                    self.grad_scale,
                    self.clip,
                    self.momentum,
                    self._perturbation(latents, generators),
                    renormalise,
                )
        strips = {
            caption: torch.stack([images[int(step)] for step in steps_shown], dim=1)
            for caption, steps_shown in strip_scales.items()
        }
        return _edited(pictures, images[0], images[updates], latents, histories, strips)

    def _best_of(
        self,
        pictures: Sequence[Picture],
        first: Tensor,
        prompt: Conditioning,
        rule: ClassifierFreeGuidance,
        generators: Sequence[torch.Generator],
    ) -> list[Edited]:
        """Pictures from the best of several latents (B, C, h, w), each for itself; the first are ``first``."""
        histories: list[list[dict[str, float]]] = [[] for _ in pictures]
        latents = best_latents = first
        before = best = torch.empty(0)
        lowest = torch.full((len(pictures),), math.inf, device=first.device)
        candidates = self._progress(self.candidates, pictures)
        for candidate in candidates:
            if candidate:
                latents = self.backbone.initial_latents(generators)
            images = self.backbone.decode_latents(self._sample(self.backbone, latents, prompt, rule, None))
            losses = self.loss(images, candidate)
            self._record(histories, pictures, candidate, images, losses)
            images = images.clamp(0, 1).cpu()
            if candidate == 0:
                before = best = images
            better = losses < lowest
            lowest = torch.where(better, losses, lowest)
            best_latents = torch.where(better[:, None, None, None], latents, best_latents)
            best = torch.where(better.cpu()[:, None, None, None], images, best)
            candidates.set_postfix(loss=f"{lowest.mean().item():.4f}")
        return _edited(pictures, before, best, best_latents, histories)

    def _progress(self, count: int, pictures: Sequence[Picture]) -> trange:
        return trange(count, desc=pictures[0].name, leave=False, disable=not self._shows_progress)

    def _guided_step_by_step(
        self,
        pictures: Sequence[Picture],
        latents: Tensor,
        prompt: Conditioning,
        rule: ClassifierFreeGuidance,
    ) -> list[Edited]:
        """Pictures by one-step classifier guidance from (B, C, h, w) latents, or pairs (B, 2, C, h, w)."""
        histories: list[list[dict[str, float]]] = [[] for _ in pictures]
        model = OneStepGuidance(
            self.backbone, self.unconditional(), rule.guidance_scale, self.loss, self.one_step_scale
        )
        # The model combines the predictions for both prompts itself.
        alone = ClassifierFreeGuidance(1.0)
        guided = self.backbone.decode_latents(self._sample(model, latents, prompt, alone, self.optimise_from))
        self._record(histories, pictures, 1, guided, self.loss(guided, 1))
        guided = guided.clamp(0, 1).cpu()
        return _edited(pictures, guided, guided, latents, histories)

    def _perturbation(self, latents: Tensor, generators: Sequence[torch.Generator]) -> Tensor | None:
        """Noise of each picture's own, so that it does not depend on the pictures beside it."""
        if not self.noise:
            return None
        drawn = [torch.randn(latents.shape[1:], generator=generator) for generator in generators]
        return self.noise * torch.stack(drawn).to(latents)

    def _record(
        self,
        histories: Sequence[list[dict[str, float]]],
        pictures: Sequence[Picture],
        step: int,
        images: Tensor,
        losses: Tensor,
    ) -> None:
        """Append a row to the history of each picture.

        Raises:
            UserError: if a loss is not finite.
        """
        for picture, history, row in zip(pictures, histories, self._rows(step, images, losses), strict=True):
            if not math.isfinite(row["loss"]):
                raise UserError(
                    f"the loss of picture '{picture.name}' is {row['loss']} at optimisation step {step}; lower "
                    "model.grad_scale or model.clip, or set trainer.precision to 32-true"
                )
            history.append(row)

    def _rows(self, step: int, images: Tensor, losses: Tensor) -> list[dict[str, float]]:
        """A row of the history of each picture."""
        rows: list[dict[str, float]] = [{"step": step, "loss": loss} for loss in losses.tolist()]
        if self.judge is not None:
            logits = self.judge(images.clamp(0, 1))
            shares = logits.sigmoid() if self.judge.multi_label else logits.softmax(dim=1)
            for row, share in zip(rows, shares[:, self._judge_class].tolist(), strict=True):
                row["judge"] = share
        return rows


def _image(picture: Picture) -> Tensor:
    assert picture.image is not None
    return picture.image


def _edited(
    pictures: Sequence[Picture],
    before: Tensor,
    after: Tensor,
    latents: Tensor,
    histories: Sequence[Sequence[Mapping[str, float]]],
    strips: Mapping[str, Tensor] = {},
) -> list[Edited]:
    """Each picture's part of (B, 3, H, W) images, (B, ..., C, h, w) latents and (B, S, 3, H, W) strips.

    Before are photographs themselves, and ``before`` is of generated pictures alone.
    """
    return [
        Edited(
            picture,
            before[index] if picture.image is None else picture.image[0],
            after[index, None],
            {caption: strip[index] for caption, strip in strips.items()},
            {},
            latents[index],
            histories[index],
        )
        for index, picture in enumerate(pictures)
    ]


def _judge(
    judge: str | None, label: str | None, guidances: Sequence[ImageGuidance]
) -> tuple[TimmClassifier | None, int]:
    """The judge and the index of its class."""
    if judge is None:
        if label is not None:
            raise UserError(f"model.judge_label is '{label}' without a judge; set model.judge, or remove it")
        return None, 0
    if label is None:
        raise UserError(f"the judge '{judge}' does not know what to look for; set model.judge_label")
    if is_guide(judge, guidances):
        raise UserError(f"the judge '{judge}' is one of the guidances; a judge must be another model")
    classifier = TimmClassifier(judge)
    return classifier, classifier.label_index(label)
