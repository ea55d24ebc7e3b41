"""The state of the classifier before CASO's training, and the starting vectors of the tokens that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Literal

import numpy as np
import torch
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from tokenlearn.data.batches import ImageBatch
from tokenlearn.data.interfaces import LabelledImages
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.losses import AttributeInClassifier
from tokenlearn.metrics.neural_collapse import NeuralCollapse
from tokenlearn.models.attributes import Attribute, check_class_names
from tokenlearn.models.classifier import TimmClassifier
from tokenlearn.pipeline import Pipeline
from tokenlearn.progress import progress
from tokenlearn.tokens import ClassInitialiser, Space, class_vectors, input_embedding, with_vectors, word_ids
from tokenlearn.tokens.directions import PairTemplates, class_directions, parts_of
from tokenlearn.tokens.settings import TokenSettings
from tokenlearn.training.caso_edit import Edits

_MEASURES = (
    "within_class_variability",
    "equiangularity",
    "maximal_angle",
    "self_duality",
    "nearest_centre_disagreement",
)


@dataclass(frozen=True)
class Initialisation:
    """Where tokens start.

    Attributes:
        kind: ``words`` starts at ``tokens.initial_words``. ``direction`` starts at the difference of the text
            encoder's mean outputs for prompts with the class and prompts without it, for tokens of the output space.
            The others go from the words to where the class means of the classifier point to, see
            :mod:`tokenlearn.tokens.class_initialisation`, for tokens of the input space.
        batches: training batches whose images these others edit.
        step: step of ``pull_back``, in units of the vocabulary's median norm.
        words: number of words whose edits are evaluated: per class for ``vocabulary``, in all for ``ridge``.
        collapse_batches: training batches whose labelled images give the class means of the classifier's features, and
            measures of how far the features have collapsed to the means. Without labels, the rows of the classifier's
            head replace the means.
        prompts: class to a prompt that asks for it, for ``direction``.
        directions: how pairs of prompts are made from these, for ``direction``.

    Raises:
        UserError: if a number is out of range, or prompts are missing or of no use.
    """

    kind: ClassInitialiser | Literal["direction"] = "words"
    batches: int = 1
    step: float = 1.0
    words: int = 32
    collapse_batches: int = 8
    prompts: dict[str, str] = field(default_factory=dict)
    directions: PairTemplates = field(default_factory=PairTemplates)

    def __post_init__(self) -> None:
        if bool(self.prompts) != (self.kind == "direction"):
            raise UserError(
                f"initialisation.kind is {self.kind} and initialisation.prompts "
                f"{'has ' + ', '.join(self.prompts) if self.prompts else 'is empty'}; prompts are for the kind "
                "direction, which needs them"
            )
        check_at_least("initialisation", 1, batches=self.batches, words=self.words)
        check_at_least("initialisation", 0, collapse_batches=self.collapse_batches)


@dataclass(frozen=True, eq=False)
class ClassMeans:
    """Class means of an attribute in the classifier's features.

    Attributes:
        directions: (K, F) ``mu_a = m_a - mu_G``, definition 1 of CASO, or the head's rows in their place.
        global_mean: (F,) ``mu_G``, 0 for the head's rows.
        counts: (K,) number of images of each class; None for the head's rows.
        collapse: measures of neural collapse by name, 0 for a collapsed classifier; empty for the head's rows.
    """

    directions: Tensor
    global_mean: Tensor
    counts: Tensor | None = None
    collapse: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_head(cls, attribute: Attribute) -> ClassMeans:
        """Rows of the classifier's head in place of the means."""
        return cls(attribute.directions, torch.zeros(attribute.directions.shape[1]))

    def of(self, attribute: Attribute) -> AttributeInClassifier:
        """The attribute as the objective needs it."""
        return AttributeInClassifier(attribute.classes, attribute.multi_label, self.directions, self.global_mean)


def initial_words(tokens: TokenSettings, settings: Initialisation, attributes: Sequence[Attribute]) -> dict[str, str]:
    """Placeholder to the word or words that its token starts from.

    Raises:
        UserError: if there are no words, or a word for each class where the kind of start needs one word.
    """
    if tokens.initial_words is None:
        raise UserError("tokens.initial_words is null; name a word, and set initialisation.kind to vocabulary")
    if settings.kind not in ("words", "direction") and (tokens.class_words or "{}" in tokens.initial_words):
        name = "class_words" if tokens.class_words else f"initial_words '{tokens.initial_words}'"
        raise UserError(
            f"tokens.{name} differs between classes, but initialisation.kind {settings.kind} starts from one word; "
            "name one in tokens.initial_words, or set initialisation.kind to words"
        )
    words = tokens.words_of([name for attribute in attributes for name in attribute.class_names])
    return {
        token: words[name]
        for attribute in attributes
        for token, name in zip(attribute.placeholders, attribute.class_names, strict=True)
    }


def check_space(tokens: TokenSettings, settings: Initialisation) -> None:
    """Refuse a start that is not in the space of the tokens.

    Raises:
        UserError: naming both settings and the ways out.
    """
    if settings.kind == "direction" and tokens.space == "input":
        raise UserError(
            "initialisation.kind direction is a start in the output space, but tokens.space is input; set "
            "tokens.space to output, or initialisation.kind to vocabulary"
        )
    if settings.kind not in ("words", "direction") and tokens.space != "input":
        raise UserError(
            f"initialisation.kind {settings.kind} is a start in the input space, but tokens.space is {tokens.space}; "
            "set initialisation.kind to direction or words, or tokens.space to input"
        )


def direction_vectors(
    settings: Initialisation, attributes: Sequence[Attribute], pipeline: Pipeline, space: Space
) -> dict[str, list[Tensor]]:
    """Vectors (1, width) for each text encoder of the token of each class: one natural unit of its direction.

    Args:
        settings: prompts, and how pairs are made of them.
        attributes: the attributes.
        pipeline: frozen model.
        space: space of the tokens.

    Raises:
        UserError: for a prompt of an unknown class, or see :func:`tokenlearn.tokens.directions.class_directions`.
    """
    token_of = {
        name: token
        for attribute in attributes
        for name, token in zip(attribute.class_names, attribute.placeholders, strict=True)
    }
    for name in settings.prompts:
        if name not in token_of:
            raise UserError(
                f"initialisation.prompts has '{name}', which is no class; the classes are {', '.join(token_of)}"
            )
    found = class_directions(
        pipeline,
        [attribute.class_names for attribute in attributes],
        settings.prompts,
        settings.directions,
        "content" if space == "output_content" else "all",
    )
    return {token_of[name]: parts_of(of_class.unit * of_class.vector, pipeline) for name, of_class in found}


def check_data_classes(attributes: Sequence[Attribute], data: LabelledImages | None) -> None:
    """Refuse data whose class indices mean other classes than the model's.

    Raises:
        UserError: see :func:`tokenlearn.models.attributes.check_class_names`.
    """
    for attribute in attributes:
        names = () if data is None else data.class_names.get(attribute.name, ())
        fix = f"list the classes of the model, in its order, in data.labels.classes.{attribute.name}"
        check_class_names(attribute, names, fix)


def first_batches(data: LabelledImages | None, count: int, device: torch.device) -> Iterator[ImageBatch]:
    """This process's part of the first training batches, from another loader than the training's."""
    if count and data is not None:
        for batch in islice(data.train_dataloader(), count):
            yield move_data_to_device(batch, device)


def measure_class_means(
    attributes: Sequence[Attribute],
    batches: Iterable[ImageBatch],
    features: Callable[[ImageBatch], Tensor],
    classify: Callable[[Tensor], Tensor],
    device: torch.device,
) -> list[ClassMeans]:
    """Class means of each attribute over labelled images of all processes.

    Args:
        attributes: the attributes.
        batches: images of this process; they are not read further than a batch without labels.
        features: features (B, F) of the images of a batch.
        classify: the classifier's outputs (B, num_outputs) for features.
        device: device of the images.

    Returns:
        Class means; rows of the head where there are no labels, or a class has no image.

    Raises:
        UserError: if the data have more classes of an attribute than the model.
    """
    if device.type == "mps":  # Apple's GPUs have no float64, which the sums need
        device = torch.device("cpu")
    metrics = {
        attribute.name: NeuralCollapse(len(attribute.classes), attribute.directions.shape[1], attribute.directions).to(
            device
        )
        for attribute in attributes
    }
    decide = {attribute.name: attribute.class_index for attribute in attributes}
    for batch in batches:
        labelled = batch.labels.keys() & metrics.keys()
        if not labelled:
            break
        batch_features = features(batch)
        outputs, batch_features = classify(batch_features), batch_features.to(device)
        for name in labelled:
            labels, metric = batch.labels[name].to(device), metrics[name]
            if (largest := int(labels.max())) >= len(metric.counts):
                raise UserError(
                    f"the data have class {largest} of '{name}', whose {len(metric.counts)} classes in the model are "
                    f"numbered from 0; name all classes in model.attributes.{name}"
                )
            metric.update(batch_features, labels, decide[name](outputs).to(device))
    return [_class_means(attribute, metrics[attribute.name]) for attribute in attributes]


def _class_means(attribute: Attribute, metric: NeuralCollapse) -> ClassMeans:
    if not metric.update_called:
        return ClassMeans.of_head(attribute)
    try:
        found = metric.compute()
    except UserError as error:
        rank_zero_warn(f"the head of the classifier replaces the class means of '{attribute.name}': {error}")
        return ClassMeans.of_head(attribute)
    return ClassMeans(
        found.class_directions.float(),
        found.global_mean.float(),
        found.counts,
        {measure: float(getattr(found, measure)) for measure in _MEASURES},
    )


def log_collapse(
    attributes: Sequence[Attribute], means: Sequence[ClassMeans], loggers: Iterable[Logger], step: int
) -> None:
    """Log the measures of neural collapse as ``collapse/MEASURE/ATTRIBUTE``, and print their means over attributes.

    Args:
        attributes: the attributes.
        means: class means of each attribute.
        loggers: loggers of the trainer.
        step: step of the training.
    """
    figures = {
        f"collapse/{measure}/{attribute.name}": value
        for attribute, item in zip(attributes, means, strict=True)
        for measure, value in item.collapse.items()
    }
    if not figures:
        return
    for logger in loggers:
        logger.log_metrics(figures, step=step)
    for measure in _MEASURES:
        values = [value for name, value in figures.items() if name.startswith(f"collapse/{measure}/")]
        rank_zero_info(f"classifier's {measure.replace('_', ' ')}: {np.mean(values):.3f} (0 if collapsed)")


def starting_vectors(
    settings: Initialisation,
    base: Tensor,
    directions: Tensor,
    *,
    edits: Sequence[Edits],
    pipeline: Pipeline,
    placeholder: str,
    prompt: str,
    classifier: TimmClassifier,
    show_progress: bool,
) -> Tensor:
    """Starting vectors of the tokens of all classes, with a progress bar.

    Args:
        settings: where tokens start.
        base: (n, width) vectors of a word, the widths of all text encoders summed.
        directions: (K, F) directions of all classes.
        edits: noised images, the same on all processes.
        pipeline: backbone and tokens.
        placeholder: any token with n vectors, which stands for each of the others.
        prompt: prompt with this token.
        classifier: classifier of the features.
        show_progress: whether this process shows the bar.

    Returns:
        (K, n, width) vectors.

    Raises:
        UserError: see :func:`tokenlearn.tokens.class_vectors`.
    """
    assert pipeline.tokens is not None
    assert settings.kind != "direction"

    def features(images: Edits) -> Tensor:
        return classifier.features(pipeline.backbone.decode_latents(images.edited([prompt] * len(images))))

    return class_vectors(
        settings.kind,
        base,
        directions,
        features=with_vectors(pipeline.tokens, placeholder, features),
        batches=edits,
        table=torch.cat([input_embedding(encoder).weight for encoder in pipeline.backbone.text_encoders], dim=1),
        candidates=word_ids(pipeline.backbone.tokenizers[0]),
        step=settings.step,
        num_candidates=settings.words,
        progress=partial(progress, description="Starting tokens", unit="batch", shown=show_progress),
    )
