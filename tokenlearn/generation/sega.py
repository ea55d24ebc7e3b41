"""SEGA: semantic guidance of generated images and photos (Brack et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tokenlearn.data.images_to_edit import EditableImage
from tokenlearn.diffusion import GridSolver
from tokenlearn.editing import Editing, ImageEditor
from tokenlearn.errors import UserError, check_at_least, check_file_name
from tokenlearn.generation.base import ImageBatches, batches_to_edit, images_to_edit, unfinished
from tokenlearn.generation.results import BEFORE, EditResult, EditTask, ResultPlan, file_stem
from tokenlearn.guidance import SEGA, GuidedModel, RecordedGuidance, SemanticEdit
from tokenlearn.guidance.semantic import MomentumAfter, ThresholdOver
from tokenlearn.models import Conditioning, DiffusionBackbone
from tokenlearn.pasting import Paste, is_pasted
from tokenlearn.pipeline import Sampling, finished
from tokenlearn.token_task import TokenTask
from tokenlearn.tokens import Embeddings

ALL = "all"


class Sega(TokenTask, EditTask):
    """Guides images along concepts without training (https://arxiv.org/abs/2301.12247).

    Every image is made plain, with each edit alone, and with all edits together. A concept is words, a learned token,
    or a signed sum of both. Images are generated from prompts and seeds, or are photos that are inverted first. They
    are settings of this task, so its configs have no data section.

    Args:
        backbone: frozen diffusion model.
        edits: concepts and how they are applied, see :class:`tokenlearn.guidance.SemanticEdit`.
        images: folder of photos of any size, in any depth, or one photo; null for generated images.
        prompts: images to generate and edit: each prompt with each seed. They are ignored beside ``images``.
        seeds: seeds of generated images.
        together: whether to make an edit of all concepts too, where there are several.
        embeddings: embedding files, see :func:`tokenlearn.tokens.load_bank`. The tokens of a checkpoint replace them.
        check_vocabulary: whether to say where tokens were learned beside other words than the backbone's; files of
            another width are refused in any case.
        sampling: settings of the sampler for generated images; its guidance is the scale of classifier-free guidance.
        threshold_over: whether thresholds are of a sample's whole tensor, as in the paper, or of each channel, as in
            diffusers.
        momentum_after: ``own_warmup`` adds a concept's momentum with the concept; ``all_warmups`` once the warm-ups of
            all concepts are over, as in the paper.
        editing: settings of inversion and denoising of photos.
        record_guidance: write the guidance of each edit, by seed, for later runs.
        recorded_guidance: folder ``guidance`` of an earlier run with ``record_guidance``, whose edits are applied to
            these prompts instead of evaluating concepts; the seeds must be among those of that run.
        batch_size: images to generate at once.
        paste: photos onto which edits are pasted as differences, so that the rest keeps its details: those that are
            ``larger`` than the model's size, ``always``, or ``never``.

    Attributes:
        images, plan: see :class:`EditTask`.

    Raises:
        UserError: if there are no images or edits, two have one name, the guidance is not a scale, the inversion does
            not suit momentum, or a number is out of range.
    """

    takes_checkpoint_tokens = True

    def __init__(
        self,
        backbone: DiffusionBackbone,
        *,
        edits: list[SemanticEdit] = [],  # noqa: B006 - read only; a list is what YAML shows
        images: str | None = None,
        prompts: list[str] = [],  # noqa: B006 - read only
        seeds: list[int] = [0],  # noqa: B006 - read only
        together: bool = True,
        embeddings: Embeddings = [],  # noqa: B006 - read only
        check_vocabulary: bool = True,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        threshold_over: ThresholdOver = "tensor",
        momentum_after: MomentumAfter = "own_warmup",
        editing: Editing = Editing(801, inversion="edit_friendly"),  # noqa: B008 - frozen
        record_guidance: bool = False,
        recorded_guidance: str | None = None,
        batch_size: int = 8,
        paste: Paste = "larger",
    ) -> None:
        super().__init__(backbone, sampling)
        self.paste = paste
        # In Python, as in YAML, the settings of an edit may be a mapping.
        edits = [SemanticEdit(**edit) if isinstance(edit, Mapping) else edit for edit in edits]
        self.load_embeddings(embeddings, check_vocabulary)
        self.images = images_to_edit(images, prompts, seeds, backbone=backbone, sampling=sampling)
        check_at_least("model", 1, batch_size=batch_size)
        if not isinstance(sampling.guidance, int | float):
            raise UserError(
                f"model.sampling.guidance must be the scale of classifier-free guidance, got "
                f"{type(sampling.guidance).__name__}; give concepts in model.edits"
            )
        if bool(edits) == (recorded_guidance is not None):
            raise UserError("set either model.edits, such as {concept: glasses}, or model.recorded_guidance")
        _check_recording(record_guidance, recorded_guidance, images, prompts)
        self.guidance_scale = float(sampling.guidance)
        self.edits, self.threshold_over, self.record_guidance = edits, threshold_over, record_guidance
        self.momentum_after: MomentumAfter = momentum_after
        self.batch_size = batch_size if images is None else 1  # photos differ in size
        self.editing = editing
        self.editor = None if images is None else ImageEditor(backbone, editing, setting="model.editing")
        if self.editor is not None:
            _check_evaluations(self.editor)
        if edits:
            SEGA(list(edits)).check_steps(sampling.steps if self.editor is None else self.editor.num_steps)
        self._recorded = _recorded_files(recorded_guidance, seeds)
        columns = [(edit.caption, [edit]) for edit in edits]
        if together and len(edits) > 1:
            columns.append((ALL, list(edits)))
        captions = [caption for caption, _ in columns] or list(self._recorded)
        names = [file_stem(caption) for caption in captions]
        if unnamed := next((caption for caption, name in zip(captions, names, strict=True) if not name), None):
            raise UserError(
                f"model.edits has one of the name '{unnamed}', of which no folder can be made; give it another name, "
                "with letters or digits"
            )
        for name in names:
            check_file_name(name, "the edit of model.edits")
        if images is None and BEFORE in names:
            raise UserError(f"model.edits has one of the name '{BEFORE}', as the images without an edit; rename it")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"model.edits has two of the name '{twice}'; give one of them another name")
        self._columns = {name: column for name, (_, column) in zip(names, columns, strict=False)}
        self.plan = ResultPlan(
            dict(zip(names, captions, strict=True)),
            sheet="contact_sheet.png",
            first_caption="plain",
            writes_before=images is None,
        )

    def predict_dataloader(self) -> ImageBatches:
        """This rank's images."""
        return batches_to_edit(self.images, self.plan, self.trainer, batch_size=self.batch_size)

    def on_predict_start(self) -> None:
        """Check that every token of a prompt or a concept is known.

        Raises:
            UserError: if one is not.
        """
        concepts = [edit.concept for edit in self.edits]
        self.check_prompts([*self.images.prompts, self.editing.source_prompt, *concepts])

    def predict_step(self, batch: list[EditableImage | str]) -> list[EditResult]:
        """Edit the images of a batch that are not done."""
        return self.edit_images(unfinished(batch))

    def edit_images(self, images: Sequence[EditableImage]) -> list[EditResult]:
        """Images plain and with all edits; generated images in one batch."""
        if self.editor is None:
            return self._generated(images) if images else []
        return [self._photo(image, self.editor) for image in images]

    def _generated(self, images: Sequence[EditableImage]) -> list[EditResult]:
        prompts, seeds = [image.prompt for image in images], [image.seed for image in images]
        before = finished(self.pipeline.generate(prompts, seeds))
        prompt = self.pipeline.encode(prompts)
        made: list[Tensor] = []
        recordings: list[dict[str, Tensor]] = [{} for _ in images]
        for files in self._recorded.values():
            vectors = torch.stack([load_file(files[seed])["guidance"] for seed in seeds], dim=1)
            rule = RecordedGuidance(self.guidance_scale, vectors.to(self.device))
            made.append(self._sample(seeds, self.pipeline.guided_model(prompt, rule)))
        for name, edits in self._columns.items():
            model = self.pipeline.guided_model(prompt, self._rule(edits, self.guidance_scale))
            made.append(self._sample(seeds, model))
            if self.record_guidance:
                assert isinstance(model.rule, SEGA)
                for recording, vectors in zip(recordings, model.rule.recorded.unbind(dim=1), strict=True):
                    recording[name] = vectors
        edited = torch.stack(made, dim=1)
        return [
            EditResult(image, plain, results, guidance=recording)
            for image, plain, results, recording in zip(images, before, edited, recordings, strict=True)
        ]

    def _sample(self, seeds: Sequence[int], model: GuidedModel[Conditioning]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of B seeds by a guided model."""
        return finished(self.backbone.decode_latents(self.pipeline.sample_latents(seeds, model)))

    def _photo(self, image: EditableImage, editor: ImageEditor) -> EditResult:
        assert image.image is not None
        source = self.pipeline.encode([self.editing.source_prompt])
        inverted = editor.invert(self.backbone.encode_images(image.image), source)
        # At scale 1, the source prompt gives the image back; only concepts move it.
        models = [self.pipeline.guided_model(source, self._rule(edits, 1.0)) for edits in self._columns.values()]
        edited = torch.cat([editor.denoise(inverted, model) for model in models])
        height, width = image.image.shape[-2:]
        unedited = None
        if image.original is not None and is_pasted(self.paste, image.size, (width, height)):
            unedited = editor.denoise_towards(inverted, source, [], [])[0]
        return EditResult(image, image.image[0], edited, unedited=unedited)

    def _rule(self, edits: Sequence[SemanticEdit], guidance_scale: float) -> SEGA:
        return SEGA(
            list(edits),
            guidance_scale,
            threshold_over=self.threshold_over,
            record=self.record_guidance,
            momentum_after=self.momentum_after,
        )


def _check_recording(record: bool, recorded: str | None, images: str | None, prompts: Sequence[str]) -> None:
    """Refuse recorded guidance of photos, which have no seeds, and a recording for several prompts."""
    if (record or recorded) and images is not None:
        raise UserError(
            "guidance is recorded for seeds, which photos do not have; set model.prompts instead of images"
        )
    if record and len(prompts) > 1:
        raise UserError(f"record_guidance takes one prompt, got {len(prompts)}; give the others with the recording")


def _check_evaluations(editor: ImageEditor) -> None:
    """Refuse reversible solvers that do not evaluate the network exactly once at every step, as momentum needs."""
    solver = editor.solver
    if isinstance(solver, GridSolver):
        stages = solver.method.steps(solver.grid(from_timestep=editor.editing.timestep))
        if [stage.step for stage in stages] != list(range(editor.num_steps)):
            raise UserError(
                f"model.editing.inversion {type(solver.method).__name__} does not evaluate the network exactly once a "
                "step, as momentum needs; set it to edit_friendly, ddim or Leapfrog"
            )


def _recorded_files(folder: str | None, seeds: Sequence[int]) -> dict[str, dict[int, Path]]:
    """Name of each recorded edit to its files by seed."""
    if folder is None:
        return {}
    edits = sorted(path for path in Path(folder).expanduser().glob("*") if path.is_dir())
    if not edits:
        raise UserError(
            f"folder '{folder}' has no recorded guidance; name the folder 'guidance' of a run with record_guidance"
        )
    files = {edit.name: {seed: edit / f"seed{seed}.safetensors" for seed in seeds} for edit in edits}
    for of_seeds in files.values():
        for seed, path in of_seeds.items():
            if not path.is_file():
                raise UserError(
                    f"no guidance was recorded for seed {seed} ('{path}'); record it, or leave out the seed"
                )
    return files
