"""Cases of the evaluation of optimised latents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from tokenlearn.data.images_to_edit import EditableImage, FolderImages, GeneratedImages
from tokenlearn.diffusion import Gradient, ReversibleSolver
from tokenlearn.diffusion.latent_optimisation import LatentOptimisation
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.evaluation.baselines import candidates_at_equal_cost
from tokenlearn.guidance import TFGSettings
from tokenlearn.losses.objective import Objective
from tokenlearn.models import DiffusionBackbone
from tokenlearn.pipeline import Sampling


@dataclass(frozen=True, kw_only=True)
class LocalSearch:
    """Settings of the search around the best noise, see :func:`tokenlearn.evaluation.baselines.local_search`.

    Attributes:
        random_share: share of the candidates that are independent, in (0, 1]; the others are near the best of them.
        angle: rotation of the best latents towards new noise, in radians.

    Raises:
        UserError: if a number is out of range.
    """

    random_share: float = 0.5
    angle: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.random_share <= 1:
            raise UserError(f"search.random_share must be above 0 and at most 1, got {self.random_share}")
        if not 0 < self.angle <= math.pi / 2:
            raise UserError(f"search.angle must be above 0 and at most pi / 2, got {self.angle}")


@dataclass(frozen=True, kw_only=True, eq=False)
class DoodlCase:
    """Images that are optimised for one objective, or for one target each.

    The images are generated from ``prompts``; or from ``for_each``, which lists a prompt for each target of the
    objective and the judge, such as each class; or they are photos, ``images``.

    Attributes:
        row: row of the table; cases of the same row are counted together.
        objective: loss of the images; of a list, the sum.
        judge: rates the images, and shares no model with the objective.
        prompts: prompts of the images, each with each seed.
        for_each: target to prompt, each with each seed. Objective and judge get the target of each image.
        images: photo, or folder of photos, to edit.
        seeds: seeds of the initial latents.
        sampling: settings of the sampler.
        gradient: how the gradient goes through the sampler, see :class:`tokenlearn.generation.Doodl`.
        optimisation: settings of the optimisation.
        source_prompt: what photos show; empty for the unconditional model.
        one_step_scale: strength of one-step classifier guidance.
        tfg: strengths of training-free guidance.
        search: settings of the search around the best noise.
        candidates: images that ``best_of`` and ``search`` choose from; null for as many as cost what the optimisation
            costs. ``best_of_tfg`` chooses from as many as cost the same.

    Raises:
        UserError: if there is not exactly one of prompts, for_each and images, or a number is out of range.
    """

    row: str
    objective: Objective | list[Objective]
    judge: Objective
    prompts: list[str] = field(default_factory=list)
    for_each: dict[str, str] = field(default_factory=dict)
    images: str | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    sampling: Sampling = field(default_factory=Sampling)
    gradient: Gradient | None = None
    optimisation: LatentOptimisation = field(default_factory=LatentOptimisation)
    source_prompt: str = ""
    one_step_scale: float = 100.0
    tfg: TFGSettings = field(default_factory=TFGSettings)
    search: LocalSearch = field(default_factory=LocalSearch)
    candidates: int | None = None

    def __post_init__(self) -> None:
        given = {"prompts": self.prompts, "for_each": self.for_each, "images": self.images}
        if len(named := [name for name, value in given.items() if value]) != 1:
            raise UserError(
                f"a case of row '{self.row}' has {' and '.join(named) or 'none'} of prompts, for_each and images; "
                "give one of them"
            )
        check_at_least("cases", 1, candidates=self.number_of_candidates)

    @property
    def number_of_candidates(self) -> int:
        """Images that ``best_of`` chooses from."""
        return candidates_at_equal_cost(self.optimisation.steps) if self.candidates is None else self.candidates

    @property
    def chooses_latents(self) -> bool:
        """Whether the first latents are free, as ``best_of`` needs them."""
        return self.images is None and self.optimisation.from_timestep is None

    @property
    def looks_ahead(self) -> bool:
        """Whether the solver is a scheduler, as training-free guidance needs it."""
        return self.images is None and not isinstance(self.sampling.solver, ReversibleSolver)

    def has_texts(self, objective: Objective) -> bool:
        """Whether the objective of generated images says in words what it asks for."""
        return self.images is None and any(objective.texts(next(iter(self.for_each), None)))

    def described_sampling(self) -> str:
        """Number of steps, solver and guidance, for people."""
        sampling = self.sampling
        solver = sampling.solver or ("EDICT" if self.images is not None else "DDIM")
        name = solver if isinstance(solver, str) else type(solver).__name__
        if not isinstance(sampling.guidance, int | float):
            return f"{sampling.steps} steps of {name} under {type(sampling.guidance).__name__}"
        return f"{sampling.steps} steps of {name} at guidance {self.guidance_scale:g}"

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance; NaN for another rule. Photos are sampled without guidance."""
        guidance = self.sampling.guidance
        if not isinstance(guidance, int | float):
            return math.nan
        return 1.0 if self.images is not None else float(guidance)

    @property
    def targets(self) -> list[str] | None:
        """The different targets, None without any."""
        return list(self.for_each) or None

    def case_images(self, backbone: DiffusionBackbone) -> CaseImages:
        """The images, read or specified when they are asked for."""
        side, factor = backbone.latent_size * backbone.vae_scale_factor, backbone.vae_scale_factor
        if self.images is not None:
            return CaseImages(FolderImages(self.images, min(self.sampling.size or (side,)), factor), [])
        height, width = self.sampling.size or (side, side)
        prompts = list(self.for_each.values()) or self.prompts
        targets = [target for target in self.for_each for _ in self.seeds]
        return CaseImages(GeneratedImages(prompts, self.seeds, (width, height)), targets)


class CaseImage(NamedTuple):
    """An image of a case, by the case's index, and the image's target or None."""

    case: int
    image: EditableImage
    target: str | None


class CaseImages:
    """The images of a case.

    Args:
        images: the images.
        targets: target of each, or none.
    """

    def __init__(self, images: FolderImages | GeneratedImages, targets: Sequence[str]) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images.names)

    def load(self, case: int, index: int) -> CaseImage:
        """An image by its index, as an image of a case."""
        return CaseImage(case, self.images[index], self.targets[index] if self.targets else None)


class TargetedObjective(Objective):
    """An objective of a batch of images whose targets are known.

    Args:
        objective: the objective.
        targets: B targets, or None.
    """

    def __init__(self, objective: Objective, targets: Sequence[str] | None) -> None:
        super().__init__()
        self.objective, self.targets = objective, targets

    def forward(self, images: Tensor, step: int = 0, targets: Sequence[str] | None = None) -> Tensor:
        """See :class:`Objective`; ``targets`` are ignored."""
        losses: Tensor = self.objective(images, step, self.targets)
        return losses

    def loss(self, images: Tensor, targets: Sequence[str] | None = None) -> Tensor:
        """See :class:`Objective`; ``targets`` are ignored."""
        return self.objective.loss(images, self.targets)

    def models(self) -> Iterator[str]:
        """See :class:`Objective`."""
        yield from self.objective.models()
