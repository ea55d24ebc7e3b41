"""Long records of an evaluation: one line per measurement, collected over any number of processes."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from tokenlearn.files import atomic_write

if TYPE_CHECKING:
    from pathlib import Path


class Record(NamedTuple):
    """One measurement of one image, or of several together.

    Attributes:
        method: how the image was made, such as ``caso`` or ``plain``.
        item: row of the table that the image belongs to, such as an attribute or a class.
        side: direction of the edit, such as ``add``; empty where there is one only.
        measure: quantity, such as ``success`` or ``seconds``.
        seed: seed of a generated image, or name of a given one or of several.
        value: measured value; of a yes-or-no measure 1 or 0.
        strength: strength of the edit where several are compared.
        label: judged label where it is another one than the item.
    """

    method: str
    item: str
    side: str
    measure: str
    seed: int | str
    value: float
    strength: float | None = None
    label: str = ""


class Records(Metric):
    """Records of all processes.

    Records hold words that differ between processes, such as names of images. The state is therefore the records'
    text as bytes, which processes exchange like any tensor.
    """

    full_state_update = False
    text: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.set_dtype(torch.uint8)  # the type of the empty state of a process without records
        self.add_state("text", [], dist_reduce_fx="cat")

    def update(
        self,
        measure: str,
        values: Tensor,
        seeds: Sequence[int | str],
        *,
        method: str,
        item: str | Sequence[str] = "",
        side: str | Sequence[str] = "",
        strength: float | None = None,
        label: str = "",
    ) -> None:
        """Add one measure of a batch of images.

        Args:
            measure: see :class:`Record`, as for all arguments.
            values: (B,) numbers or truth values.
            seeds: B seeds or names.
            method: of all images.
            item: of all images, or B items.
            side: of all images, or B sides.
            strength: of all images.
            label: of all images.
        """
        items, sides = ([words] * len(values) if isinstance(words, str) else words for words in (item, side))
        lines = [
            json.dumps(Record(method, of_item, of_side, measure, seed, float(value), strength, label))
            for value, seed, of_item, of_side in zip(values.tolist(), seeds, items, sides, strict=True)
        ]
        encoded = bytearray("".join(f"{line}\n" for line in lines).encode())
        if encoded:
            self.text.append(torch.frombuffer(encoded, dtype=torch.uint8).to(self.device))

    def compute(self) -> list[Record]:
        """All records, in the order in which each process added them."""
        if not len(self.text):
            return []
        lines = dim_zero_cat(self.text).cpu().numpy().tobytes().decode().splitlines()
        return [Record(*json.loads(line)) for line in lines]


def write_records(records: Sequence[Record], path: Path, settings: str | None = None) -> None:
    """Write records as a CSV file with a header, whole or not at all; a column ``settings`` is last if it is given."""
    last = {} if settings is None else {"settings": settings}
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*Record._fields, *last])
        for record in records:
            entries = record._asdict() | {"value": f"{record.value:.9g}"} | last
            writer.writerow(["" if entry is None else entry for entry in entries.values()])
