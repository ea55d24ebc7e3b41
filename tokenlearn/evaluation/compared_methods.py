"""Ways to draw a class: prompts, tokens, guidance and searches, each as a function of seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from tokenlearn.data.latent_cache import json_hash
from tokenlearn.diffusion import LastK
from tokenlearn.diffusion.latent_optimisation import LatentOptimisation
from tokenlearn.errors import UserError, check_at_least, check_template
from tokenlearn.evaluation.baselines import best_of
from tokenlearn.evaluation.sega_methods import concept_edit
from tokenlearn.guidance import SEGA, ConceptSettings
from tokenlearn.latent_optimiser import LatentOptimiser
from tokenlearn.losses.objective import Crops
from tokenlearn.models import TimmClassifier
from tokenlearn.objectives import ClassifierLoss
from tokenlearn.pipeline import Pipeline
from tokenlearn.tokens import Embeddings, TokenBank, load_bank
from tokenlearn.tokens.directions import direction
from tokenlearn.tokens.settings import token_name
from tokenlearn.training.word_search import WordSearch, find_words

Method = Literal["plain", "word", "described", "token", "direction", "sega", "doodl", "best_of"]
"""Ways to draw a class: its name; its name after the best single word of the vocabulary; its description; its name
after its token; its name with the direction from the neutral prompt to the description added to the encoded prompt;
its name with the description as a concept of semantic guidance; its name with optimised latents; and the best of
several images of its name."""

METHODS: tuple[Method, ...] = get_args(Method)
DIRECTION, WORD = "<direction>", "<word>"

Maker = Callable[[Sequence[str], Sequence[int]], Tensor]
"""Images (B, 3, H, W), nominally in [0, 1], of B templates with ``{}`` and B seeds."""


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """Settings of single methods.

    Attributes:
        words: class to the word of the method ``word``; of other classes it is searched for by the guide.
        search: settings of this search.
        neutral: what images show without any class, such as ``person``, for ``direction``.
        concept: how ``sega`` adds the class. Its default warm-up is for 50 sampling steps.
        optimisation: settings of ``doodl``.
        crops: random crops that the guide sees in ``doodl`` and ``best_of``; null for whole images.
        candidates: images that ``best_of`` chooses from, for each seed.

    Raises:
        UserError: for fewer than 2 candidates.
    """

    words: dict[str, str] = field(default_factory=dict)
    search: WordSearch = field(default_factory=WordSearch)
    neutral: str | None = None
    concept: ConceptSettings = field(default_factory=ConceptSettings)
    optimisation: LatentOptimisation = field(default_factory=LatentOptimisation)
    crops: Crops | None = None
    candidates: int = 8

    def __post_init__(self) -> None:
        check_at_least("settings", 2, candidates=self.candidates)


class ComparedMethods:
    """Makes images of classes by each method.

    Args:
        pipeline: frozen model with the settings of the sampler, whose guidance is a scale.
        classes: class to description or None.
        methods: methods that will be asked for.
        settings: settings of single methods.
        prompts: templates with ``{}``.
        guide: classifier that searches and optimises; None where no method needs it.
        embeddings: embedding files of the classes' tokens.

    Attributes:
        words: class to the word of the method ``word``, as far as they are known.

    Raises:
        UserError: naming the setting that a method lacks.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        classes: Mapping[str, str | None],
        methods: Sequence[Method],
        settings: MethodSettings,
        *,
        prompts: Sequence[str],
        guide: TimmClassifier | None = None,
        embeddings: Embeddings = [],  # noqa: B006 - read only
    ) -> None:
        self.pipeline, self.classes, self.settings, self.prompts = pipeline, classes, settings, prompts
        self.guide, self._guide_hash = guide, json_hash(guide)
        self.words = dict(settings.words)
        for template in prompts:
            check_template(template, "prompts", "class")
        _check_given(methods, classes, settings, has_guide=guide is not None, has_tokens=bool(embeddings))
        if guide is not None:
            ClassifierLoss(guide).check(list(classes))
        self.subjects: dict[str, str] = {}
        self._with_tokens = pipeline
        if "token" in methods:
            self._with_tokens, self.subjects = _with_tokens(pipeline, classes, embeddings)
        if "sega" in methods:
            self._semantic("any").check_steps(pipeline.sampling.steps)

    def maker(self, method: Method, name: str) -> Maker:
        """The function that makes images of a class by a method; what it needs is made first.

        Args:
            method: the method.
            name: class.
        """
        pipeline, description = self.pipeline, self.classes[name]
        if method == "plain":
            return _of_prompts(pipeline, name)
        if method == "word":
            return _of_prompts(pipeline, f"{self.words[name]} {name}")
        if method == "described":
            assert description is not None
            return _of_prompts(pipeline, description)
        if method == "token":
            return _of_prompts(self._with_tokens, self.subjects[name])
        if method == "direction":
            return _of_prompts(self._with_direction(name), f"{DIRECTION} {name}")
        if method == "sega":
            return _of_prompts(pipeline, name, rule=self._semantic(description or name))
        return self._optimised(method, name)

    def key(self, method: Method, name: str) -> dict[str, Any]:
        """What images of a class by a method depend on, beside model, sampler, prompts and seeds."""
        settings, description = self.settings, self.classes[name]
        keys: dict[Method, list[Any]] = {
            "plain": [],
            "word": [self.words.get(name)],
            "described": [description],
            "token": [self.subjects.get(name), self._vectors_in(self.subjects.get(name, ""))],
            "direction": [description, settings.neutral, self.prompts],
            "sega": [description, settings.concept],
            "doodl": [self._guide_hash, settings.optimisation, settings.crops],
            "best_of": [self._guide_hash, settings.candidates, settings.crops],
        }
        return {"method": method, "class": name, "settings": keys[method]}

    def _vectors_in(self, subject: str) -> dict[str, list[Any]]:
        """Numbers of the tokens that a phrase has."""
        bank = self._with_tokens.tokens
        names = () if bank is None else bank.placeholders
        return {
            name: [vectors.tolist() for vectors in bank.get(name)]
            for name in names
            if bank is not None and name in subject
        }

    def find_words(self) -> dict[str, str]:
        """Search for the words of the classes that have none."""
        missing = [name for name in self.classes if name not in self.words]
        if not missing:
            return {}
        assert self.guide is not None
        # The preselection moves the vector of a token, whatever its name.
        scratch = TokenBank({WORD: 1}, self.pipeline.backbone.embedding_widths)
        found = find_words(
            self.pipeline.with_tokens(scratch),
            ClassifierLoss(self.guide),
            missing,
            self.prompts[0],
            search=self.settings.search,
            gradient=LastK(1),
        )
        self.words |= found
        return found

    def _semantic(self, concept: str) -> SEGA:
        scale = self.pipeline.sampling.guidance
        assert isinstance(scale, int | float)
        return SEGA([concept_edit(concept, self.settings.concept)], scale)

    def _with_direction(self, name: str) -> Pipeline:
        """The pipeline with the direction from the neutral prompts to the descriptions."""
        shown, neutral = self.classes[name] or name, self.settings.neutral
        found = direction(
            self.pipeline,
            positive=[template.format(shown) for template in self.prompts],
            negative=[template.format(neutral) for template in self.prompts],
            token=DIRECTION,
        )
        return self.pipeline.with_tokens(found)

    def _optimised(self, method: Method, name: str) -> Maker:
        """Images of the name with latents that the guide likes."""
        settings, guide = self.settings, self.guide
        assert guide is not None
        objective = ClassifierLoss(guide, labels=name, crops=settings.crops)
        optimiser = LatentOptimiser(self.pipeline, objective, settings.optimisation)

        def make(templates: Sequence[str], seeds: Sequence[int]) -> Tensor:
            start = optimiser.from_prompts([template.format(name) for template in templates], seeds)
            if method == "best_of":
                return best_of(optimiser, start, settings.candidates)
            return optimiser.optimise(start, names=[f"{name}, seed {seed}" for seed in seeds]).after

        return make


def _of_prompts(pipeline: Pipeline, subject: str, rule: SEGA | None = None) -> Maker:
    """Images of a subject in templates."""

    def make(templates: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return pipeline.generate([template.format(subject) for template in templates], seeds, rule=rule)

    return make


def _check_given(
    methods: Sequence[Method],
    classes: Mapping[str, str | None],
    settings: MethodSettings,
    *,
    has_guide: bool,
    has_tokens: bool,
) -> None:
    """Refuse methods that lack a setting."""
    needing_guide = [method for method in ("doodl", "best_of") if method in methods]
    if "word" in methods and set(classes) - settings.words.keys():
        needing_guide.append("word")
    if needing_guide and not has_guide:
        raise UserError(
            f"method '{needing_guide[0]}' needs a classifier that chooses; set guide, another one than the judge, or "
            f"leave '{needing_guide[0]}' out of methods"
        )
    undescribed = [name for name, description in classes.items() if description is None]
    if "described" in methods and undescribed:
        raise UserError(
            f"method 'described' needs a description of '{undescribed[0]}'; set classes.{undescribed[0]}, or leave "
            "'described' out of methods"
        )
    if "direction" in methods and settings.neutral is None:
        raise UserError(
            "method 'direction' needs what images show without any class; set settings.neutral, such as to person, or "
            "leave 'direction' out of methods"
        )
    if "token" in methods and not has_tokens:
        raise UserError(
            "method 'token' needs embedding files; set embeddings to them or their folder, or leave 'token' out of "
            "methods"
        )


def _with_tokens(
    pipeline: Pipeline, classes: Mapping[str, str | None], embeddings: Embeddings
) -> tuple[Pipeline, dict[str, str]]:
    """The pipeline with the classes' tokens, and class to the phrase with its token.

    A file of this package names its class; of others, a token that is named like the class is taken.

    Raises:
        UserError: if a class has no token.
    """
    bank, files = load_bank(embeddings, pipeline.backbone.embedding_widths, pipeline.backbone.word_tables)
    by_class = {
        file.metadata["class"]: file.metadata.get("prompt", file.token) for file in files if "class" in file.metadata
    }
    tokens = {file.token.casefold(): file.token for file in files}
    subjects: dict[str, str] = {}
    for name in classes:
        named_like_it = tokens.get(token_name("<{}>", name))
        subject = by_class.get(name) or (named_like_it and f"{named_like_it} {name}")
        if subject is None:
            known = ", ".join(sorted(tokens.values()))
            raise UserError(
                f"embeddings have no token of class '{name}', only {known}; add its file, rename its token as in "
                f"'embeddings: {{{token_name('<{}>', name)}: FILE}}', or leave 'token' out of methods"
            )
        subjects[name] = subject
    return pipeline.with_tokens(bank), subjects
