"""SEGA: semantic guidance of generated pictures and photographs (Brack et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from tokenlearn.data.pictures import Picture
from tokenlearn.diffusion import Inverted
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.guidance import RecordedGuidance, SemanticGuidance
from tokenlearn.guidance.semantic import ThresholdOver
from tokenlearn.methods.concepts import SemanticEdit, check_steps, check_tokens, encode_terms, semantic_guidance
from tokenlearn.methods.editing import PictureEditor
from tokenlearn.methods.picture_task import Edited, PictureTask, file_stem
from tokenlearn.models import Conditioning, DiffusionBackbone

SteppedInversion = Literal["ddim", "edit_friendly", "leapfrog"]
"""Those of :data:`tokenlearn.methods.editing.Inversion` that sample with one evaluation at every step, the first
included, as the momentum of semantic guidance needs it."""

ALL = "all"


class _Column(NamedTuple):
    """An edit of every picture: one concept, or all together."""

    caption: str
    edits: list[SemanticEdit]


class Sega(PictureTask):
    """Steer pictures along concepts without training (https://arxiv.org/abs/2301.12247).

    Every picture is drawn plain, with each edit alone, and with all edits together. A concept is a few words, a
    learned token, or a signed sum of both. Pictures are generated from prompts and seeds, or photographs that are
    inverted first. They are settings of this task, so a config of it has no data section.

    Args:
        backbone: frozen diffusion model.
        edits: concepts and how they are applied, see :class:`tokenlearn.methods.concepts.SemanticEdit`.
        images: folder of pictures of any size, in any depth, or one picture.
        prompts: pictures to generate and to edit, instead of a folder: each prompt with each seed.
        seeds: seeds of generated pictures.
        together: whether to make an edit of all concepts too, where there are several.
        embeddings: embedding files of learned tokens. A checkpoint's tokens take their place.
        num_inference_steps: sampling steps.
        guidance_scale: classifier-free guidance scale of generated pictures.
        scheduler: diffusers scheduler of generated pictures by class name; null for the pipeline's own.
        negative_prompt: prompt of the unconditional branch.
        threshold_over: whether thresholds are of a sample's whole tensor, as in the paper, or of each channel, as in
            diffusers.
        timestep: noise level to invert photographs to, one of the sampling steps'; more changes more.
        inversion: of photographs: ``edit_friendly`` (https://arxiv.org/abs/2304.06140) gives a photograph back exactly
            where no concept acts; so does the invertible chain ``leapfrog``, without noise, and ``ddim`` in the limit
            of many steps.
        source_prompt: what photographs show, such as ``a portrait``; empty for the unconditional model.
        record_guidance: write the guidance of each edit, by seed, to use it again.
        recorded_guidance: folder ``guidance`` of an earlier run with ``record_guidance``, whose edits are applied to
            these prompts instead of evaluating concepts; the seeds must be among that run's.
        batch_size: pictures to generate at once.

    Raises:
        UserError: if there are no pictures or edits, two have one name, or a number is out of range.
    """

    sheet_name = "contact_sheet.png"
    first_caption = "plain"

    def __init__(
        self,
        backbone: DiffusionBackbone,
        edits: list[SemanticEdit] = [],  # noqa: B006 - read only; a list is what YAML shows
        images: str | None = None,
        prompts: list[str] = [],  # noqa: B006 - as above
        seeds: list[int] = [0],  # noqa: B006 - as above
        together: bool = True,
        embeddings: list[str] = [],  # noqa: B006 - as above
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        scheduler: str | None = None,
        negative_prompt: str = "",
        threshold_over: ThresholdOver = "tensor",
        timestep: int = 801,
        inversion: SteppedInversion = "edit_friendly",
        source_prompt: str = "",
        record_guidance: bool = False,
        recorded_guidance: str | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__(
            backbone,
            images,
            prompts,
            seeds,
            embeddings,
            num_inference_steps,
            guidance_scale,
            scheduler,
            negative_prompt,
            batch_size if images is None else 1,
        )
        check_at_least("model", 1, batch_size=batch_size)
        if bool(edits) == (recorded_guidance is not None):
            raise UserError("set either model.edits, such as {concept: glasses}, or model.recorded_guidance")
        if (record_guidance or recorded_guidance) and images is not None:
            raise UserError("guidance is recorded for seeds, and photographs have none; set model.prompts instead")
        if record_guidance and len(prompts) > 1:
            raise UserError(
                f"record_guidance takes one prompt, got {len(prompts)}; give the others with the recording"
            )
        check_steps(edits, num_inference_steps)
        self.concepts, self.threshold_over, self.source_prompt = edits, threshold_over, source_prompt
        self.record_guidance = record_guidance
        self._recorded = _recorded_files(recorded_guidance, seeds)
        columns = [_Column(edit.caption, [edit]) for edit in edits]
        if together and len(edits) > 1:
            columns.append(_Column(ALL, list(edits)))
        self._columns = columns
        self.captions = [column.caption for column in columns] or list(self._recorded)
        self.edit_names = [file_stem(caption) for caption in self.captions]
        if twice := next((name for name in self.edit_names if self.edit_names.count(name) > 1), None):
            raise UserError(f"model.edits has two of the name '{twice}'; give one of them another name")
        self.strip_scales = {}
        self.editor = (
            None
            if images is None
            else PictureEditor(backbone, num_inference_steps, timestep, "model.timestep", inversion)
        )

    def on_predict_start(self) -> None:
        """Check that every token of a concept is known.

        Raises:
            UserError: if one is not.
        """
        check_tokens([edit.concept for edit in self.concepts], () if self.bank is None else self.bank.placeholders)

    def edit_pictures(self, pictures: Sequence[Picture]) -> list[Edited]:
        """Draw pictures plain and edited; generated ones in one batch."""
        if self.editor is None:
            return self._generated(pictures) if pictures else []
        return [self._photograph(picture, self.editor) for picture in pictures]

    def _generated(self, pictures: Sequence[Picture]) -> list[Edited]:
        prompts, seeds = [picture.prompt for picture in pictures], [picture.seed for picture in pictures]
        before = self.backbone.decode_latents(self.generate_latents(prompts, seeds)).clamp(0, 1)
        prompt = self.backbone.encode_prompts(prompts)
        columns: list[Tensor] = []
        recordings: list[dict[str, Tensor]] = [{} for _ in pictures]
        for files in self._recorded.values():
            vectors = torch.stack([load_file(files[seed])["guidance"] for seed in seeds], dim=1)
            columns.append(
                self._draw(seeds, RecordedGuidance(self.guidance.guidance_scale, vectors.to(self.device)), prompt, [])
            )
        for name, column in zip(self.edit_names, self._columns, strict=False):
            rule = self._rule(self.guidance.guidance_scale, column.edits)
            columns.append(self._draw(seeds, rule, prompt, column.edits))
            if self.record_guidance:
                for recording, vectors in zip(recordings, rule.recorded.unbind(dim=1), strict=True):
                    recording[name] = vectors
        edits = torch.stack(columns, dim=1)
        return [
            Edited(picture, plain, own, {}, recording)
            for picture, plain, own, recording in zip(pictures, before, edits, recordings, strict=True)
        ]

    def _draw(
        self,
        seeds: Sequence[int],
        rule: SemanticGuidance | RecordedGuidance,
        prompt: Conditioning,
        edits: Sequence[SemanticEdit],
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] under a guidance rule."""
        terms = encode_terms(self.backbone, edits)
        return self.draw(seeds, rule.conditionings(self.unconditional(), prompt, *terms), rule)

    def _rule(self, guidance_scale: float, edits: Sequence[SemanticEdit]) -> SemanticGuidance:
        return semantic_guidance(guidance_scale, edits, self.threshold_over, record=self.record_guidance)

    def _photograph(self, picture: Picture, editor: PictureEditor) -> Edited:
        assert picture.image is not None
        source = self.backbone.encode_prompts([self.source_prompt])
        inverted: Inverted = editor.invert(self.backbone.encode_images(picture.image), source)
        edits = []
        for column in self._columns:
            # The source prompt at scale 1 is what the picture was inverted with; concepts alone pull it away.
            rule = self._rule(1.0, column.edits)
            conditionings = rule.conditionings(
                self.unconditional(), source, *encode_terms(self.backbone, column.edits)
            )
            edits.append(editor.denoise_by(inverted, conditionings, rule))
        return Edited(picture, picture.image[0], torch.cat(edits), {}, {})


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
