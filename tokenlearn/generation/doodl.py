"""DOODL: direct optimisation of diffusion latents (Wallace et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenlearn.data.images_to_edit import EditableImage
from tokenlearn.diffusion import Gradient
from tokenlearn.diffusion.latent_optimisation import LatentOptimisation
from tokenlearn.errors import check_at_least
from tokenlearn.generation.base import ImageBatches, batches_to_edit, images_to_edit, unfinished
from tokenlearn.generation.results import EditResult, EditTask, ResultPlan
from tokenlearn.latent_optimiser import LatentOptimiser, OptimisedLatents, Start, sampling_for
from tokenlearn.losses.objective import Objective, as_objective
from tokenlearn.models import DiffusionBackbone
from tokenlearn.pipeline import Sampling
from tokenlearn.token_task import TokenTask
from tokenlearn.tokens import Embeddings

DOODL = "doodl"
_STRIP = "optimisation"


class Doodl(TokenTask, EditTask):
    """Optimises the latents that sampling starts from, so that the finished images meet an objective.

    See :class:`tokenlearn.latent_optimiser.LatentOptimiser`. Images are generated from prompts and seeds, or are
    photos: a reversible solver inverts these without guidance, so that step 0 gives them back as the autoencoder does.
    Images are settings of this task, so its configs have no data section, and the gradient needs no setting of the
    trainer.

    Args:
        backbone: frozen diffusion model.
        objective: loss of finished images; of several objectives, their sum.
        images: folder of photos of any size, in any depth, or one photo; null for generated images.
        prompts: images to generate: each prompt with each seed. They are ignored beside ``images``.
        seeds: seeds of the initial latents, and of the perturbations.
        embeddings: embedding files, see :func:`tokenlearn.tokens.load_bank`. The tokens of a checkpoint replace them.
        check_vocabulary: whether to say where tokens were learned beside other words than the backbone's; files of
            another width are refused in any case.
        sampling: settings of the sampler. Without a solver, DDIM is used, and for photos EDICT. The scale of
            classifier-free guidance is for generated images; another guidance rule is for photos too.
        gradient: how the gradient goes through the sampler; null for Reversible with a reversible solver, else
            Checkpointed.
        optimisation: settings of the optimisation.
        source_prompt: what photos show; empty for the unconditional model.
        strip_images: images of the optimisation on a strip, evenly over the steps; 0 for no strip.
        judge: objective whose models guide nothing, for the history; null for none.
        batch_size: generated images in a batch.

    Attributes:
        images, plan: see :class:`EditTask`.
        objective: the objective.
        judge, optimisation, gradient: as given.

    Raises:
        UserError: if there are no images or objectives, the judge guides, the solver cannot invert photos, or a number
            is out of range.
    """

    takes_checkpoint_tokens = True

    def __init__(
        self,
        backbone: DiffusionBackbone,
        objective: Objective | list[Objective],
        *,
        images: str | None = None,
        prompts: list[str] = [],  # noqa: B006 - read only; a list is what YAML shows
        seeds: list[int] = [0],  # noqa: B006 - read only
        embeddings: Embeddings = [],  # noqa: B006 - read only
        check_vocabulary: bool = True,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        gradient: Gradient | None = None,
        optimisation: LatentOptimisation = LatentOptimisation(),  # noqa: B008 - frozen
        source_prompt: str = "",
        strip_images: int = 5,
        judge: Objective | None = None,
        batch_size: int = 1,
    ) -> None:
        super().__init__(backbone, sampling_for(sampling, inverts=images is not None))
        self.load_embeddings(embeddings, check_vocabulary)
        self.images = images_to_edit(images, prompts, seeds, backbone=backbone, sampling=sampling)
        check_at_least("model", 1, batch_size=batch_size)
        check_at_least("model", 0, strip_images=strip_images)
        self.objective, self.judge = as_objective(objective), judge
        self.optimisation, self.gradient, self.source_prompt = optimisation, gradient, source_prompt
        self.batch_size = batch_size if images is None else 1  # photos differ in size
        self.optimiser()  # refuses now what would fail at the first image
        shown = {round(optimisation.steps * index / strip_images) for index in range(1, strip_images + 1)}
        self._strip_steps = sorted(shown)
        self.plan = ResultPlan(
            {DOODL: DOODL},
            {_STRIP: [f"step {step}" for step in self._strip_steps]} if shown else {},
            writes_before=images is None,
            writes_latents=True,
        )
        self._shows_progress = False

    def optimiser(self) -> LatentOptimiser:
        """The optimiser of this task's settings and present tokens."""
        return LatentOptimiser(
            self.pipeline, self.objective, self.optimisation, gradient=self.gradient, judge=self.judge
        )

    def predict_dataloader(self) -> ImageBatches:
        """This rank's images."""
        return batches_to_edit(self.images, self.plan, self.trainer, batch_size=self.batch_size)

    def on_predict_start(self) -> None:
        """Check the tokens of all prompts, and show the steps where the trainer shows progress at all.

        Raises:
            UserError: if a prompt has a token that is not loaded.
        """
        self.check_prompts([*self.images.prompts, self.source_prompt])
        self._shows_progress = self.trainer.progress_bar_callback is not None and self.global_rank == 0

    def predict_step(self, batch: list[EditableImage | str]) -> list[EditResult]:
        """Optimise the images of a batch that are not done."""
        return self.edit_images(unfinished(batch))

    def edit_images(self, images: Sequence[EditableImage]) -> list[EditResult]:
        """Optimise images of one size together, each for itself.

        Raises:
            UserError: if a loss is not finite; the files of finished images stay.
        """
        if not images:
            return []
        optimiser = self.optimiser()
        optimised = optimiser.optimise(
            self.start(optimiser, images),
            names=[image.name for image in images],
            snapshots=self._strip_steps,
            progress=images[0].name if self._shows_progress else None,
        )
        return [self._result(image, optimised, index) for index, image in enumerate(images)]

    def start(self, optimiser: LatentOptimiser, images: Sequence[EditableImage]) -> Start:
        """The latents of images of one size, all generated or all photos, before their optimisation."""
        seeds = [image.seed for image in images]
        photos = [image.image for image in images if image.image is not None]
        if photos:
            return optimiser.from_images(torch.cat(photos), seeds, self.source_prompt)
        return optimiser.from_prompts([image.prompt for image in images], seeds)

    def _result(self, image: EditableImage, optimised: OptimisedLatents, index: int) -> EditResult:
        """The part of one image; a photo itself is before."""
        strip = [optimised.snapshots[step][index] for step in self._strip_steps]
        return EditResult(
            image,
            optimised.before[index] if image.image is None else image.image[0],
            optimised.after[index, None],
            {_STRIP: torch.stack(strip)} if strip else {},
            latents=optimised.latents[index],
            history=optimised.history[index],
        )
