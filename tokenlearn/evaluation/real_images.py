"""Real images of classes, which evaluations compare generated images with."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenlearn.data.image_source import open_images
from tokenlearn.data.pixels import readable_squares
from tokenlearn.errors import UserError, check_at_least


@dataclass(frozen=True, kw_only=True)
class RealImages:
    """Labelled real images.

    Attributes:
        source: images, see :func:`tokenlearn.data.image_source.open_images`, such as ``portraits:2000:7``.
        column: column of the class: its name, or an index of a named class.
        images: images of each class, the first of them.
        fewest: fewest images of a class with which a comparison makes sense.

    Raises:
        UserError: if a number is out of range.
    """

    source: str
    column: str
    images: int = 100
    fewest: int = 2

    def __post_init__(self) -> None:
        check_at_least("real", 1, images=self.images, fewest=self.fewest)

    def of_classes(self, classes: Sequence[str], size: int) -> dict[str, Tensor]:
        """Class to its images (N, size, size, 3) uint8.

        Raises:
            UserError: if there is no such column, or a class has too few images.
        """
        dataset = open_images(self.source).open()
        if self.column not in dataset.features:
            nearest = difflib.get_close_matches(self.column, dataset.features, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(dataset.features)}"
            raise UserError(f"real.column '{self.column}' is not a column of '{self.source}'; {hint}")
        named = getattr(dataset.features[self.column], "names", None)
        places: dict[str, list[int]] = {name: [] for name in classes}
        for place, value in enumerate(dataset[self.column]):
            name = named[value] if named is not None and value is not None and value >= 0 else str(value)
            if name in places:
                places[name].append(place)
        images = {
            name: readable_squares((dataset[place]["image"] for place in found), size, self.images, self.source)
            for name, found in places.items()
        }
        for name, found in images.items():
            if len(found) < self.fewest:
                known = f"; its classes are {', '.join(named)}" if named is not None and name not in named else ""
                raise UserError(
                    f"'{self.source}' has {len(found)} usable images of class '{name}', and {self.fewest} are needed; "
                    f"give a larger real.source, or leave the class out{known}"
                )
        return {name: torch.stack(found) for name, found in images.items()}
