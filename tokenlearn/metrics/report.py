"""What a test found, apart from how it is printed and drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenlearn.metrics.class_accuracy import wilson_interval

_NO_SHARES = ("loss", "psnr", "distance", "correlation", "similarity", "score", "seconds", "evaluations")


@dataclass
class Report:
    """The table of a test.

    Attributes:
        title: what the table is about, with the judge's name.
        columns: names of the columns, the first for the rows' names.
        rows: one per class, attribute or guidance; shares in [0, 1], None where nothing was measured.
        bars: columns that the picture of the table shows; ``<column>_low`` and ``<column>_high`` are its interval.
        plain: further columns for the text.
        curves: name to (kept, success) points, shares in [0, 1]: what each method changes at what cost.
        summary: flat figures for ``summary.json`` after a test; shares, but for names that :func:`is_share` tells.
        kinds: name in a summary to the kind of figure that it is, where its own name does not tell.
        fit_summary: the same after a fit.
        pictures: file stem to rows of pictures, each row a caption and (n, 3, H, W) images in [0, 1].
    """

    title: str
    columns: list[str]
    rows: list[list[str | float | None]]
    bars: list[str]
    summary: dict[str, float]
    kinds: dict[str, str] = field(default_factory=dict)
    fit_summary: dict[str, float] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    pictures: dict[str, list[tuple[str, Tensor]]] = field(default_factory=dict)


class PictureRows:
    """The first pictures of each caption, for :attr:`Report.pictures`.

    Args:
        length: pictures of a caption at most.
    """

    def __init__(self, length: int = 8) -> None:
        self.length = length
        self._images: dict[str, list[Tensor]] = {}

    def add(self, caption: str, images: Tensor) -> None:
        """Keep as many of the images (B, 3, H, W) in [0, 1] as still have a place."""
        row = self._images.setdefault(caption, [])
        row += list(images[: self.length - len(row)].float().cpu())

    def rows(self) -> list[tuple[str, Tensor]]:
        """Captions with their images (n, 3, H, W), in the order in which they came; none without an image."""
        return [(caption, torch.stack(images)) for caption, images in self._images.items() if images]


def is_share(name: str) -> bool:
    """Whether a figure or column of this name is a share in [0, 1]; losses, distances, correlations, times are not."""
    return not name.endswith(_NO_SHARES)


def interval_columns(name: str) -> list[str]:
    """Names of the columns of :func:`interval_cells`."""
    return [name, f"{name}_low", f"{name}_high", f"{name}_images"]


def interval_cells(correct: int, total: int) -> list[float | None]:
    """A share, both ends of its 95 % interval, and the number that it is of; None where nothing was counted."""
    if not total:
        return [None, None, None, 0]
    return [correct / total, *wilson_interval(correct, total), total]


def mean_share(counts: Tensor) -> float:
    """Mean share over rows (N, 2) of (correct, total) that count anything, NaN if none does."""
    counted = counts[counts[:, 1] > 0].double()
    return float((counted[:, 0] / counted[:, 1]).mean())
