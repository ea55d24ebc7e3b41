"""Learned tokens: a few embedding vectors per placeholder token, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from typing import Self, cast, get_args

import torch
from torch import Tensor, nn

from tokenlearn.errors import UserError
from tokenlearn.tokens.calibration import Calibration
from tokenlearn.tokens.spaces import Space


class TokenBank(nn.Module):
    """Vectors of all placeholder tokens, apart from the text encoders' own tables.

    The published codes train the encoder's whole table and undo or mask what they did not mean to change; weight decay
    then still moves every word. Here an optimizer that is given ``bank.parameters()`` cannot reach another word.

    The vectors start at zero and are meant to be set before use, see :mod:`tokenlearn.tokens.initialisation`. They
    stay in float32 when the module is converted to half precision, because a learning rate below a half-precision
    vector's rounding step would change nothing.

    Args:
        num_vectors: placeholder, as written in prompts, to its number of vectors (at least 1).
        embedding_widths: width of the input embedding of each text encoder, one for Stable Diffusion 1 and 2.
        spaces: placeholder to where its vectors live; ``input`` for those that are not named.

    Attributes:
        placeholders: the placeholders in the order of their rows.
        num_vectors: number of vectors per placeholder.
        embedding_widths: one width per text encoder.
        spaces: where the vectors of each placeholder live.
        calibrations: even strengths of the placeholders that have been calibrated.
        vectors: one (total vectors, width) float32 parameter per text encoder.

    Raises:
        UserError: for an empty bank, a placeholder that is empty, holds spaces or contains another one, a number of
            vectors below 1, or above 1 for a token that is added to outputs.
    """

    def __init__(
        self,
        num_vectors: Mapping[str, int],
        embedding_widths: Sequence[int],
        spaces: Mapping[str, Space] | None = None,
    ) -> None:
        super().__init__()
        if not num_vectors:
            raise UserError("no placeholder token given; name at least one, such as '<wizard>'")
        for placeholder, count in num_vectors.items():
            if not placeholder or not placeholder.isprintable() or any(letter.isspace() for letter in placeholder):
                raise UserError(f"placeholder token '{placeholder}' must be one visible word, such as '<wizard>'")
            if count < 1:
                raise UserError(f"placeholder token '{placeholder}' has {count} vectors; give it at least 1")
            space = (spaces or {}).get(placeholder, "input")
            if space not in get_args(Space):
                raise UserError(f"the space of '{placeholder}' is '{space}'; use {', '.join(get_args(Space))}")
            if space != "input" and count > 1:
                raise UserError(
                    f"placeholder token '{placeholder}' has {count} vectors, but one that is added to the text "
                    "encoder's output has 1; set tokens.num_vectors to 1, or tokens.space to input"
                )
        # Prompts are expanded by replacing placeholders, here as in diffusers, so one must not be inside another.
        for inner, outer in permutations(num_vectors, 2):
            if inner.casefold() in outer.casefold():
                raise UserError(f"placeholder token '{outer}' contains '{inner}'; rename one of them")
        self.placeholders = tuple(num_vectors)
        self.num_vectors = dict(num_vectors)
        self.embedding_widths = tuple(embedding_widths)
        self.spaces: dict[str, Space] = {name: (spaces or {}).get(name, "input") for name in num_vectors}
        self.calibrations: dict[str, Calibration] = {}
        total = sum(num_vectors.values())
        self.vectors = nn.ParameterList(nn.Parameter(torch.zeros(total, width)) for width in self.embedding_widths)

    def rows(self, placeholder: str) -> slice:
        """Rows of a placeholder in each of :attr:`vectors`.

        Raises:
            UserError: if the bank has no such placeholder.
        """
        if placeholder not in self.num_vectors:
            raise UserError(f"there is no token '{placeholder}'; take one of {', '.join(self.placeholders)}")
        start = sum(self.num_vectors[earlier] for earlier in self.placeholders[: self.placeholders.index(placeholder)])
        return slice(start, start + self.num_vectors[placeholder])

    def get(self, placeholder: str) -> list[Tensor]:
        """Vectors of a placeholder, (n, width) per text encoder: views, so gradients reach the parameters."""
        rows = self.rows(placeholder)
        return [vectors[rows] for vectors in self.vectors]

    @torch.no_grad()
    def set(self, placeholder: str, vectors: Sequence[Tensor]) -> None:
        """Copy vectors into a placeholder's rows, in place, so that optimizers keep their parameter.

        Args:
            placeholder: one of :attr:`placeholders`.
            vectors: (n, width) per text encoder.

        Raises:
            UserError: if the number of encoders, the number of vectors or a width differs, or a value is not finite.
        """
        rows = self.rows(placeholder)
        if len(vectors) != len(self.embedding_widths):
            raise UserError(
                f"the embedding for '{placeholder}' is for {len(vectors)} text encoder(s), this backbone has "
                f"{len(self.embedding_widths)}; use one that was made for this model family"
            )
        expected = self.num_vectors[placeholder]
        for new, width in zip(vectors, self.embedding_widths, strict=True):
            if new.ndim != 2 or new.shape[1] != width:
                raise UserError(
                    f"the embedding for '{placeholder}' has width {new.shape[-1] if new.ndim else 0}, this backbone's "
                    f"text encoder has {width}; use one that was made for this model family"
                )
            if len(new) != expected:
                raise UserError(
                    f"the embedding for '{placeholder}' has {len(new)} vectors, the token has {expected}; "
                    f"set its number of vectors to {len(new)}"
                )
            if not new.isfinite().all():
                raise UserError(
                    f"the embedding for '{placeholder}' holds values that are not finite; use an earlier one"
                )
        for parameter, new in zip(self.vectors, vectors, strict=True):
            parameter[rows] = new.to(parameter)

    @property
    def input_placeholders(self) -> list[str]:
        """Placeholders whose vectors stand in prompts, in the order of their rows."""
        return [placeholder for placeholder, space in self.spaces.items() if space == "input"]

    @property
    def output_placeholders(self) -> list[str]:
        """Placeholders whose vectors are added to the text encoders' outputs, in the order of their rows."""
        return [placeholder for placeholder, space in self.spaces.items() if space != "input"]

    def unit_names(self, placeholder: str) -> list[str]:
        """Vocabulary units of a placeholder: ``<wizard>``, ``<wizard>_1``, ..., as diffusers names them."""
        self.rows(placeholder)
        return [placeholder, *(f"{placeholder}_{index}" for index in range(1, self.num_vectors[placeholder]))]

    @torch.no_grad()
    def renormalise_(self, min_norms: Sequence[float], max_norms: Sequence[float]) -> None:
        """Scale vectors whose L2 norm is out of range back to the nearer end, in place; zero vectors stay zero.

        Args:
            min_norms: smallest norm per text encoder, for instance that of the vocabulary.
            max_norms: largest norm per text encoder.
        """
        for vectors, low, high in zip(self.vectors, min_norms, max_norms, strict=True):
            norms = vectors.norm(dim=1, keepdim=True)
            scales = norms.clamp(low, high) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
            vectors.mul_(torch.where(norms > 0, scales, 1.0))

    def get_extra_state(self) -> dict[str, int]:
        """The placeholders and their numbers of vectors, which a saved state is for."""
        return dict(self.num_vectors)

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Refuse a saved state for other placeholders, which could have the same shapes.

        Raises:
            UserError: if placeholders, their order or numbers of vectors differ.
        """
        if list(state.items()) != list(self.num_vectors.items()):
            raise UserError(
                f"the saved token bank is for {state}, this run has {self.num_vectors} (placeholder: vectors); "
                "name the same tokens in the same order"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Conversions move the vectors but leave their precision alone, Lightning's `bf16-true` included.
        return cast(Self, super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse))  # type: ignore[no-untyped-call]
