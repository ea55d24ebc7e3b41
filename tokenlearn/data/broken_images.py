"""Images that cannot be used: found once, and remembered."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenlearn.data.image_samples import ImageReading
from tokenlearn.data.image_source import ImageSource
from tokenlearn.data.latent_cache import json_hash
from tokenlearn.data.pixels import read_image
from tokenlearn.data.prefetch import prefetch
from tokenlearn.data.rows import row_name
from tokenlearn.errors import reason_of
from tokenlearn.files import atomic_write
from tokenlearn.progress import progress


def broken_rows(
    dataset: Any,  # noqa: ANN401 - datasets has no types
    found: ImageSource,
    reading: ImageReading,
    source: str,
    num_workers: int,
) -> dict[int, str]:
    """Rows of a ``Dataset`` whose images are broken, to the reason, remembered where ``datasets`` keeps prepared data.

    Args:
        dataset: the data set, opened.
        found: the same data set, which gives the fingerprint that it is remembered by.
        reading: how images are read.
        source: name of the data.
        num_workers: threads that decode.
    """
    if found.portraits or reading.broken == "error":
        return {}
    import datasets  # type: ignore[import-untyped]

    name = json_hash([found.fingerprint, reading.min_size])
    memo = Path(datasets.config.HF_DATASETS_CACHE) / "tokenlearn" / f"{name}.json"
    if memo.is_file():
        return {int(index): reason for index, reason in json.loads(memo.read_text()).items()}

    def fault(index: int) -> str | None:
        row = dataset[index]
        try:
            read_image(row[reading.column], reading.min_size)
        except Exception as error:  # decoders raise errors of many kinds
            return f"'{row_name(row, index, reading.column, source)}' ({reason_of(error)})"
        return None

    indices = range(len(dataset))
    faults: Iterable[str | None] = prefetch(fault, indices, workers=num_workers, depth=64)
    checked = progress(faults, "Checking images", unit="image", total=len(indices))
    broken = {index: reason for index, reason in enumerate(checked) if reason is not None}
    with atomic_write(memo) as temporary:
        temporary.write_text(json.dumps(broken))
    return broken
