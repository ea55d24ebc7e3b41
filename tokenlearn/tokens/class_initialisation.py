"""Starting vectors for the tokens of classes: a word, or where the classifier's class means point to.

For a token with vectors e and an image x, let ``h(x, e)`` be the classifier's penultimate features of the edit of x
under e. All initialisers but ``words`` look for the e that moves h along the direction ``mu_a`` of class a, which is
its centred class mean. In a collapsed classifier, the editing loss of CASO (https://arxiv.org/abs/2505.14254) drives h
in the same direction. Without data, the rows of the classifier's head stand in for the means
(:func:`tokenlearn.losses.attribute_directions`).

Features come from a callable, ``features(vectors, batch)``, from (n, width) vectors and a batch of images to (B, F),
differentiable by the vectors; :func:`with_vectors` makes it. Directions (K, F) may belong to several attributes,
which then share every evaluation. The vectors of several text encoders lie side by side, their widths summed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from tokenlearn.errors import UserError
from tokenlearn.tokens.bank import TokenBank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ClassInitialiser = Literal["words", "pull_back", "vocabulary", "ridge"]
"""Ways to start the tokens of classes."""

T = TypeVar("T")
Features = Callable[[Tensor, T], Tensor]
Progress = Callable[[Sequence[Any]], Iterable[Any]]
"""Goes through a sequence and shows how far it is, as ``tqdm`` does."""


def class_vectors(
    initialiser: ClassInitialiser,
    base: Tensor,
    directions: Tensor,
    *,
    features: Features[T],
    batches: Sequence[T],
    table: Tensor,
    candidates: Sequence[int] = (),
    step: float = 1.0,
    num_candidates: int = 32,
    ridge: float = 0.1,
    progress: Progress = iter,
) -> Tensor:
    """Starting vectors for the tokens of classes.

    Args:
        initialiser: ``words`` for the base itself, :func:`pull_back`, ``vocabulary`` for :func:`nearest_words`, whose
            word all vectors of a token take, or ``ridge`` for :func:`ridge_vectors`.
        base: (n, width) vectors of a word.
        directions: (K, F) directions of the classes in feature space.
        features: features of edits.
        batches: images, the same on all ranks, so that every rank finds the same vectors.
        table: (V, width) input embeddings of the whole vocabulary.
        candidates: ids of the words that ``vocabulary`` and ``ridge`` may use, see :func:`word_ids`.
        step: length of the step of ``pull_back``, in units of the vocabulary's median norm.
        num_candidates: number of words whose edits are evaluated: per class for ``vocabulary``, in all for ``ridge``.
        ridge: regularisation of ``ridge``.
        progress: shows how far the evaluations are.

    Returns:
        (K, n, width) float32 vectors, without gradient.

    Raises:
        UserError: if there are no images or candidates, a gradient is zero or not finite, or ``ridge`` is not above 0.
    """
    base, table = base.detach().float(), table.detach().float()
    if initialiser == "words":
        return base.expand(len(directions), *base.shape).clone()
    if not batches:
        raise UserError(f"initialiser '{initialiser}' needs images, got none; give data, or start from 'words'")
    median_norm = table.norm(dim=1).median()
    if initialiser == "pull_back":
        return pull_back(base, mean_gradients(features, base, directions, batches, progress), step * median_norm)
    if not candidates:
        raise UserError(f"initialiser '{initialiser}' needs words to choose from, got none; name candidates")
    if initialiser == "vocabulary":
        return nearest_words(
            features,
            base,
            directions,
            batches=batches,
            table=table,
            candidates=candidates,
            num_candidates=num_candidates,
            progress=progress,
        )
    return ridge_vectors(
        features,
        base,
        directions,
        batches=batches,
        table=table,
        candidates=candidates,
        num_words=num_candidates,
        ridge=ridge,
        norm=median_norm,
        progress=progress,
    )


def with_vectors(bank: TokenBank, placeholder: str, function: Callable[[T], Tensor]) -> Features[T]:
    """Turn a function that reads a token's vectors from a bank into a function of these vectors.

    Args:
        bank: token bank, unchanged after each call.
        placeholder: token whose vectors become the argument.
        function: encodes a prompt with the placeholder by this bank.

    Returns:
        Function of (n, width) vectors and the argument of ``function``, differentiable by the vectors.
    """
    rows = bank.rows(placeholder)
    reader = _Reader(bank, function)

    def evaluate(vectors: Tensor, batch: T) -> Tensor:
        replaced = {}
        parts = torch.split(vectors, list(bank.embedding_widths), dim=1)
        for index, (stored, part) in enumerate(zip(bank.vectors, parts, strict=True)):
            new = stored.detach().clone()
            new[rows] = part.to(new)
            replaced[f"bank.vectors.{index}"] = new
        result: Tensor = functional_call(reader, replaced, (batch,))
        return result

    return evaluate


class _Reader(nn.Module):
    """A module around a function and the bank that it reads, for :func:`torch.func.functional_call`."""

    def __init__(self, bank: TokenBank, function: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.bank = bank
        self._function = (function,)  # in a tuple, so that a function that is a module is not registered

    def forward(self, batch: Any) -> Tensor:  # noqa: ANN401 - the function's argument
        return self._function[0](batch)


def whole_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words of ASCII letters that the tokenizer reads as one unit of the vocabulary, sorted.

    Units that only end longer words, such as the second unit of "steth-oscope", are left out.
    """
    words = sorted(str(tokenizer.decode([index])).strip() for index in word_ids(tokenizer))
    units = tokenizer(words, add_special_tokens=False).input_ids
    return [word for word, ids in zip(words, units, strict=True) if len(ids) == 1 and len(word) > 1]


def word_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str] | None = None) -> list[int]:
    """Ids of words that are one unit of the vocabulary.

    Args:
        tokenizer: the text encoder's tokenizer.
        words: words; None for all whole words of ASCII letters, whose end CLIP's vocabularies mark.

    Returns:
        Ids in the order of ``words``; sorted for None.

    Raises:
        UserError: if a word is not one unit.
    """
    if words is None:
        whole_word = re.compile("[a-zA-Z]+</w>")
        return sorted(index for unit, index in tokenizer.get_vocab().items() if whole_word.fullmatch(unit))
    ids: list[int] = []
    for word in words:
        units = tokenizer(word, add_special_tokens=False).input_ids
        if len(units) != 1 or units[0] == tokenizer.unk_token_id:
            raise UserError(f"'{word}' is {len(units)} units of the text encoder's vocabulary; give words of one unit")
        ids += units
    return ids


@torch.enable_grad()
def mean_gradients(
    features: Features[T],
    base: Tensor,
    directions: Tensor,
    batches: Sequence[T],
    progress: Progress = iter,
) -> Tensor:
    """Gradient of the features' component along each direction by the token's vectors, averaged over images.

    ``E_x[J^T mu_a]`` with ``J = dh/de`` at the base: one evaluation for all directions, one vector-Jacobian product
    for each.

    Args:
        features: features of edits.
        base: (n, width) vectors.
        directions: (K, F).
        batches: images.
        progress: shows how far the evaluations are.

    Returns:
        (K, n, width) gradients.

    Raises:
        UserError: if a gradient is not finite, or zero and so without a direction.
    """
    total, count = base.new_zeros(len(directions), *base.shape), 0
    for batch in progress(batches):
        vectors = base.detach().requires_grad_()
        components = features(vectors, batch) @ directions.to(base).T
        for index, component in enumerate(components.sum(dim=0).unbind()):
            total[index] += torch.autograd.grad(component, vectors, retain_graph=index < len(directions) - 1)[0]
        count += len(components)
    if not (total.isfinite().all() and (total.flatten(1).norm(dim=1) > 0).all()):
        raise UserError("the gradient of the class directions is zero or not finite; start tokens from 'words'")
    return total / count


def pull_back(base: Tensor, gradients: Tensor, step: float | Tensor) -> Tensor:
    """One normalised gradient step from the base that increases the component along each class direction.

    ``e_a = e_base + step * g_a / ||g_a||`` for each vector separately; a vector without a gradient stays at the base.
    No word but the base is needed.

    Args:
        base: (n, width) vectors.
        gradients: (K, n, width), see :func:`mean_gradients`.
        step: length of the step.

    Returns:
        (K, n, width) vectors.
    """
    return base + step * functional.normalize(gradients, dim=2, eps=torch.finfo(gradients.dtype).tiny)


@torch.no_grad()
def nearest_words(
    features: Features[T],
    base: Tensor,
    directions: Tensor,
    *,
    batches: Sequence[T],
    table: Tensor,
    candidates: Sequence[int],
    num_candidates: int,
    progress: Progress = iter,
) -> Tensor:
    """Word whose edit moves features along each class direction, and least away from it.

    With ``d_w`` the mean change of features from the base's edits to the word's, the score of word w is
    ``<u, d_w> - ||d_w - <u, d_w> u||``, ``u = mu_a / ||mu_a||``. The second part separates a word for the class from a
    word for a kind of image that happens to show the class. Without it, the absence of a hat starts from a punk's
    hair. The base has score 0, and a class without a better word starts from the base.

    All candidates are ranked by the first-order score ``<e_w - e_base, E_x[J^T mu_a]>``, which costs one evaluation.
    The best candidates are then evaluated themselves, and each direction may take a word that was evaluated for
    another.

    Args:
        features: features of edits.
        base: (n, width) vectors at which the gradient is taken.
        directions: (K, F).
        batches: images.
        table: (V, width) input embeddings.
        candidates: ids of words.
        num_candidates: number of words per direction that are evaluated.
        progress: shows how far the evaluations are.

    Returns:
        (K, n, width) vectors; the n vectors of a token are equal.

    Raises:
        UserError: see :func:`mean_gradients`.
    """
    ids = torch.tensor(candidates, device=table.device)
    # The base adds the same to the score of every word, so it is left out.
    first_order = mean_gradients(features, base, directions, batches, progress).sum(dim=1) @ table[ids].T
    shortlists = first_order.topk(min(num_candidates, len(ids)), dim=1).indices
    evaluated = ids[sorted(set(shortlists.flatten().tolist()))]
    starts = torch.cat([base[None], table[evaluated][:, None].expand(-1, *base.shape)])
    edits = _mean_features(features, batches, starts, progress)
    changes, units = edits - edits[0], functional.normalize(directions.to(base), dim=1)
    along = changes @ units.T
    away = torch.linalg.vector_norm(changes[:, None] - along[..., None] * units, dim=2)
    return starts[(along - away).argmax(dim=0)]


@torch.no_grad()
def ridge_vectors(
    features: Features[T],
    base: Tensor,
    directions: Tensor,
    *,
    batches: Sequence[T],
    table: Tensor,
    candidates: Sequence[int],
    num_words: int,
    ridge: float,
    norm: float | Tensor,
    progress: Progress = iter,
) -> Tensor:
    """Class directions mapped to token space, by ridge regression from the features of edits to the edits' words.

    With H (m, F) the centred mean features of edits with m words and E (m, width) the centred embeddings of the words,
    the ridge estimate in its dual form is ``mu_a -> mu_a H^T (H H^T + lambda I)^-1 E``. Lambda is in units of the mean
    of the diagonal of ``H H^T``. Only the direction of the estimate is used, because class directions have no scale.

    Args:
        features: features of edits.
        base: (n, width) vectors, for the number of vectors.
        directions: (K, F).
        batches: images.
        table: (V, width) input embeddings.
        candidates: ids of words.
        num_words: number of candidates that are chosen at random, always the same ones.
        ridge: lambda, above 0.
        norm: norm of the result.
        progress: shows how far the evaluations are.

    Returns:
        (K, n, width) vectors of the given norm; the n vectors of a token are equal.

    Raises:
        UserError: if lambda is not above 0, or there are fewer than 2 words.
    """
    if ridge <= 0 or min(num_words, len(candidates)) < 2:
        raise UserError(
            f"the ridge initialiser needs a regularisation above 0 and at least 2 words, got {ridge} and "
            f"{min(num_words, len(candidates))}"
        )
    chosen = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0))[:num_words]
    embeddings = table[torch.tensor(candidates)[chosen].to(table.device)]
    edits = _mean_features(features, batches, embeddings[:, None].expand(-1, *base.shape), progress)
    edits, targets = edits - edits.mean(dim=0), embeddings - embeddings.mean(dim=0)
    gram = edits @ edits.T
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    mapped = directions.to(edits) @ edits.T @ torch.linalg.solve(gram, targets)
    return (norm * functional.normalize(mapped, dim=1))[:, None].expand(-1, len(base), -1).clone()


def _mean_features(features: Features[T], batches: Sequence[T], starts: Tensor, progress: Progress) -> Tensor:
    """Mean features (m, F) over all images of edits with each of m starts (m, n, width)."""
    return torch.stack(
        [
            torch.cat([features(vectors, batch) for batch in batches]).mean(dim=0)
            for vectors in progress(starts.unbind())
        ]
    )
