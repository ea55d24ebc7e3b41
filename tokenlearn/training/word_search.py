"""Search for the word of the vocabulary that a class's token starts from, by generated images and an objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenlearn.diffusion import Gradient, ReversibleSolver
from tokenlearn.errors import check_at_least
from tokenlearn.losses.objective import Objective
from tokenlearn.pipeline import Pipeline
from tokenlearn.progress import Meter
from tokenlearn.tokens import input_embedding, vectors_from_words, whole_words, with_vectors, word_ids
from tokenlearn.tokens.class_initialisation import mean_gradients

_SHORTLIST = 4
"""Words of each class that are compared with each other, and images per word in the comparison."""


@dataclass(frozen=True)
class WordSearch:
    """Settings of the search.

    Attributes:
        words: number of words that are tried. For a larger vocabulary, candidates are preselected by the gradient of
            the classes' losses at the word "a".
        steps: sampling steps of the images.
        batch_size: images at once; lower it where memory is short.

    Raises:
        UserError: if a number is below 1.
    """

    words: int = 256
    steps: int = 10
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_at_least("search", 1, words=self.words, steps=self.steps, batch_size=self.batch_size)


def find_words(
    pipeline: Pipeline,
    objective: Objective,
    classes: Sequence[str],
    template: str,
    *,
    search: WordSearch,
    gradient: Gradient,
    solver: str | ReversibleSolver | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """For each class, the word whose images have the lowest loss.

    One image of each word alone serves all classes. The best few words of each class are then compared in front of the
    class's name, where its token will be.

    Args:
        pipeline: backbone with the tokens of the classes, and settings of the sampler.
        objective: loss of images towards a class.
        classes: class names, known to the objective.
        template: prompt with ``{}`` where the word goes.
        search: settings.
        gradient: gradient through the sampler, for the preselection.
        solver: solver of the preselection; None for that of the pipeline.
        progress: whether to show how far it is.

    Returns:
        Class to word.
    """
    words = whole_words(pipeline.backbone.tokenizers[0])
    if len(words) > search.words:
        words = promising_words(
            pipeline,
            objective,
            classes,
            template,
            words,
            search.words,
            gradient=gradient,
            solver=solver,
            batch_size=search.batch_size,
        )

    def likelihoods(subjects: Sequence[str], seeds: Sequence[int], task: str) -> Tensor:
        prompts = [template.format(subject) for subject in subjects]
        caption = task if progress else None
        return _log_likelihoods(pipeline, objective, classes, prompts, seeds, search=search, task=caption)

    of_words = likelihoods(words, [0] * len(words), "Trying words")
    shortlists = of_words.topk(min(_SHORTLIST, len(words)), dim=0).indices.T.tolist()
    found = {}
    for index, (name, shortlist) in enumerate(zip(classes, shortlists, strict=True)):
        subjects = [f"{words[word]} {name}" for word in shortlist for _ in range(_SHORTLIST)]
        seeds = list(range(_SHORTLIST)) * len(shortlist)
        compared = likelihoods(subjects, seeds, f"Comparing words for {name}")[:, index]
        found[name] = words[shortlist[int(compared.reshape(len(shortlist), -1).mean(dim=1).argmax())]]
    return found


def promising_words(
    pipeline: Pipeline,
    objective: Objective,
    classes: Sequence[str],
    template: str,
    words: Sequence[str],
    number: int,
    *,
    gradient: Gradient,
    solver: str | ReversibleSolver | None = None,
    batch_size: int = _SHORTLIST,
) -> list[str]:
    """Words whose embeddings lie furthest along the direction that lowers a class's loss at the word "a".

    Args:
        pipeline: backbone with at least one token, whose vectors stand in for the word's.
        objective: loss of images towards a class.
        classes: K class names.
        template: prompt with ``{}`` where the word goes.
        words: words to choose from, each one unit of every vocabulary.
        number: number of words; every class gets an equal share, rounded up.
        gradient: gradient through the sampler.
        solver: None for that of the pipeline.
        batch_size: images at once, whose gradients are added up.

    Returns:
        The words in their order; fewer than the shares add up to if classes share words.
    """
    bank, backbone = pipeline.tokens, pipeline.backbone
    assert bank is not None
    token = bank.placeholders[0]
    encoders = list(zip(backbone.tokenizers, backbone.text_encoders, strict=True))
    start = torch.cat([vectors_from_words("a", *encoder, 1) for encoder in encoders], dim=1)
    tables = [
        input_embedding(encoder).weight[torch.tensor(word_ids(tokenizer, words))] for tokenizer, encoder in encoders
    ]

    def log_likelihoods(seeds: Sequence[int]) -> Tensor:
        images = pipeline.generate([template.format(token)] * len(seeds), seeds, gradient=gradient, solver=solver)
        return -objective.losses(images, classes)

    directions = torch.eye(len(classes), device=start.device)
    features = with_vectors(bank, token, log_likelihoods)
    seeds = list(range(_SHORTLIST))
    batches = [seeds[first : first + batch_size] for first in range(0, _SHORTLIST, batch_size)]
    gradients = mean_gradients(features, start, directions, batches).sum(dim=1)
    share = -(-number // len(classes))
    with torch.no_grad():
        along = torch.cat(tables, dim=1).float() @ gradients.T
    best = along.topk(min(share, len(words)), dim=0).indices
    return [words[index] for index in sorted(set(best.flatten().tolist()))]


@torch.no_grad()
def _log_likelihoods(
    pipeline: Pipeline,
    objective: Objective,
    classes: Sequence[str],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    search: WordSearch,
    task: str | None,
) -> Tensor:
    """Minus the losses (N, K), towards each of K classes, of an image of each of N prompts; ``task`` names the bar."""
    parts = []
    size = search.batch_size
    with Meter(task or "", len(prompts), unit="image", shown=task is not None) as meter:
        for start in range(0, len(prompts), size):
            batch = slice(start, start + size)
            images = pipeline.generate(prompts[batch], seeds[batch], steps=search.steps)
            parts.append(-objective.losses(images, classes))
            meter.update(len(images))
    return torch.cat(parts)
