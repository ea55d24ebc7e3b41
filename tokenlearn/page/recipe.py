"""What the images of a request are made with: as objects, and as a config of ``tokenlearn predict``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]

from tokenlearn.editing import Editing, strengths_of
from tokenlearn.guidance import SEGA, GuidanceRule, SemanticEdit, check_tokens
from tokenlearn.page.request import PageRequest
from tokenlearn.paths import resolve
from tokenlearn.pipeline import Pipeline
from tokenlearn.tokens import Embeddings
from tokenlearn.tokens.files import EmbeddingFile

INVERSION: Literal["edit_friendly"] = "edit_friendly"
PASTE = "always"
"""Photos keep their pixels where nothing is edited, and strength 0 is the photo itself."""

_CONCEPT: dict[str, Any] = {"threshold": 0.9, "momentum_scale": 0.3, "momentum_beta": 0.6}
_WARMUP = 0.15  # share of the steps before a concept acts; both as in the bundled configs
_TOKEN: dict[str, Any] = {"threshold": None, "warmup_steps": 0, "momentum_scale": 0.0}  # as an edit by tokens alone


class Recipe:
    """A request with the tokens of a pipeline, resolved to settings.

    Args:
        pipeline: model and tokens.
        request: the request.

    Attributes:
        request: as given.
        pipeline: the pipeline with the request's settings of the sampler, without concepts.
        strengths: token to the strength to edit with, of the tokens that do something.
        editing: settings of edits; the noise level is the one nearest to the request's.
        concepts: the concepts that do something.

    Raises:
        UserError: if a token is not loaded, or a calibrated strength is out of its range.
    """

    def __init__(self, pipeline: Pipeline, request: PageRequest) -> None:
        self.request = request
        self.pipeline = pipeline.with_sampling(
            steps=request.steps,
            guidance=request.guidance,
            negative_prompt=request.negative_prompt if request.photo is None else "",
        )
        known = {} if pipeline.tokens is None else pipeline.tokens.calibrations
        self.strengths: dict[str, float] = {}
        for token, strength in request.tokens.items():
            if strength:
                self.strengths |= strengths_of({token: strength}, pipeline.tokens, token in known)
        timesteps = pipeline.backbone.make_editing_solver(request.steps).timesteps
        level = request.change * pipeline.backbone.process.num_timesteps
        timestep = min(timesteps, key=lambda timestep: abs(timestep - level))
        self.editing = Editing(timestep, request.steps, INVERSION)
        acting = sum(other <= timestep for other in timesteps) if request.photo is not None else request.steps
        self.concepts = [
            SemanticEdit(concept=concept, scale=scale, warmup_steps=int(_WARMUP * acting), **_CONCEPT)
            for concept, scale in request.concepts.items()
            if scale
        ]
        prompts = [] if request.photo is not None else [request.prompt, request.negative_prompt]
        known_tokens = () if pipeline.tokens is None else pipeline.tokens.placeholders
        check_tokens([*prompts, *self.strengths, *request.concepts], known_tokens)

    @property
    def rule(self) -> GuidanceRule:
        """Guidance of generated images, by the concepts if there are any."""
        guidance = self.request.guidance
        return SEGA(list(self.concepts), guidance) if self.concepts else self.pipeline.sampling.rule

    @cached_property
    def photo_edits(self) -> list[SemanticEdit]:
        """Tokens and concepts that are applied to a photo together; the tokens as in an edit by tokens alone."""
        tokens = [SemanticEdit(concept=token, scale=scale, **_TOKEN) for token, scale in self.strengths.items()]
        return [*tokens, *self.concepts]

    def used(self, tokens: Iterable[str]) -> list[str]:
        """Those of the tokens that the images depend on."""
        prompts = [] if self.request.photo is not None else [self.request.prompt, self.request.negative_prompt]
        text = "\n".join([*prompts, *self.strengths, *(edit.concept for edit in self.concepts)]).casefold()
        return [token for token in tokens if token.casefold() in text]

    def config(self, embeddings: Embeddings | None) -> dict[str, Any]:
        """Config of ``tokenlearn predict`` that makes the same images.

        Args:
            embeddings: embedding files of the tokens that are used.
        """
        backbone = self.pipeline.backbone
        init_args: dict[str, Any] = {
            "backbone": {
                "class_path": type(backbone).__name__,
                "init_args": {"pretrained": backbone.pretrained, "dtype": backbone.precision},
            },
            **({"embeddings": embeddings} if embeddings else {}),
        }
        if self.request.photo is not None:
            name, of_task, data = self._photo_task(self.request.photo.name)
        elif self.strengths:
            name, of_task, data = "Edit", self._generated() | {"edits": [self.strengths]}, None
            of_task |= {"editing": _editing(self.editing), "sampling": self._sampling()}
        else:
            # One image at a time: a batch rounds differently.
            name, of_task, data = "Generate", {"sampling": self._sampling()}, self._generated() | {"batch_size": 1}
        config: dict[str, Any] = {"model": {"class_path": name, "init_args": init_args | of_task}}
        if data is not None:
            config["data"] = {"class_path": "PromptList", "init_args": data}
        accelerator = "cpu" if backbone.device.type == "cpu" else "gpu"
        return config | {"trainer": {"accelerator": accelerator, "devices": 1}}

    def _photo_task(self, photo: str) -> tuple[str, dict[str, Any], None]:
        common = {"images": photo, "paste": PASTE, "editing": _editing(self.editing)}
        if not self.concepts:
            return "Edit", common | {"edits": [self.strengths]}, None
        return "Sega", common | {"edits": [_concept(edit) for edit in self.photo_edits]}, None

    def _generated(self) -> dict[str, Any]:
        return {"prompts": [self.request.prompt], "seeds": list(self.request.seeds)}

    def _sampling(self) -> dict[str, Any]:
        guidance: Any = self.request.guidance
        if self.concepts:
            edits = [_concept(edit) for edit in self.concepts]
            guidance = {"class_path": "SEGA", "init_args": {"edits": edits, "guidance_scale": guidance}}
        return {
            "steps": self.request.steps,
            "guidance": guidance,
            "solver": None,
            "negative_prompt": self.request.negative_prompt,
        }


def config_text(config: dict[str, Any], photo: str | None) -> str:
    """A config as YAML, with the command that runs it.

    Args:
        config: see :meth:`Recipe.config`.
        photo: name of the photo that is edited, None for generated images.
    """
    where = "" if photo is None else f", in the folder of the photo {photo!r}"
    lines = [f"# The images of the page. Run it{where} as", "#   tokenlearn predict --config page.yaml"]
    together = config["model"]["class_path"] == "Sega" and len(config["model"]["init_args"]["edits"]) > 1
    lines += ["# The image of the page is in images/all, beside those of each concept alone."] if together else []
    return "\n".join([*lines, yaml.safe_dump(config, sort_keys=False, allow_unicode=True)])


def setting_of(embeddings: Embeddings, files: Sequence[EmbeddingFile]) -> Embeddings:
    """A setting of embedding files that has only some of them, by the names that the user gave.

    Args:
        embeddings: the setting with all files.
        files: contents of the files to keep.
    """
    if isinstance(embeddings, Mapping):
        return {file.token: embeddings[file.token] for file in files}
    names = {
        Path(resolve(name)).expanduser(): name
        for name in ([embeddings] if isinstance(embeddings, str) else embeddings)
    }
    kept: dict[str, None] = {}
    for file in files:
        assert file.path is not None
        folder = names.get(file.path.parent)
        kept[names.get(file.path) or (str(file.path) if folder is None else f"{folder}/{file.path.name}")] = None
    return list(kept)


def _editing(editing: Editing) -> dict[str, Any]:
    return {"timestep": editing.timestep, "steps": editing.steps, "inversion": editing.inversion}


def _concept(edit: SemanticEdit) -> dict[str, Any]:
    names = ("concept", "scale", "threshold", "warmup_steps", "momentum_scale", "momentum_beta")
    return {name: getattr(edit, name) for name in names}
