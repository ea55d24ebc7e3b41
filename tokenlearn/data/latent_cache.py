"""Latents on disk: made once, in shards, and found again only by the same model, transform and data set."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenlearn.errors import UserError, check_at_least, reason_of
from tokenlearn.files import atomic_write
from tokenlearn.progress import Meter

if TYPE_CHECKING:
    import lightning as L

T = TypeVar("T")

CacheDtype = Literal["float32", "float16"]

_OPEN_SHARDS = 16
_SETTINGS = (str, int, float, list, tuple, dict)  # types of a module's settings


@dataclass(frozen=True)
class LatentCaching:
    """Where and how latents are cached.

    Attributes:
        folder: folder of all caches; all processes must see it. Each cache has its subfolder.
        dtype: precision on disk. In float32, latents are read as they were written.
        shard_size: images per file.

    Raises:
        UserError: if ``shard_size`` is below 1.
    """

    folder: str
    dtype: CacheDtype = "float32"
    shard_size: int = 1024

    def __post_init__(self) -> None:
        check_at_least("data.cache", 1, shard_size=self.shard_size)


class LatentCache:
    """Latents of numbered items in ``<folder>/<hash of key>/00000.safetensors`` and so on.

    A shard has the latents of ``shard_size`` consecutive items, except items that have none. Shards are written whole,
    so an interrupted :meth:`build` resumes at the first missing one; ``key.json`` is written last and marks the cache
    as complete. Reading maps shards into memory, a few at a time, so memory stays flat.

    Args:
        settings: where and how to cache.
        key: everything that the latents depend on, as JSON types; another key is another folder.
        rank: this process among ``world_size``; each builds every ``world_size``-th shard.
        world_size: number of processes.
        barrier: called with a name at a point that all processes must reach before any continues.
    """

    def __init__(
        self,
        settings: LatentCaching,
        key: Mapping[str, Any],
        *,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[str], Any] = lambda name: None,
    ) -> None:
        self.key = {**key, "dtype": settings.dtype, "shard_size": settings.shard_size}
        self.folder = Path(settings.folder).expanduser() / json_hash(self.key)
        self.dtype, self.shard_size = getattr(torch, settings.dtype), settings.shard_size
        self.rank, self.world_size, self.barrier = rank, world_size, barrier
        self._shard = lru_cache(_OPEN_SHARDS)(self._open_shard)

    @property
    def complete(self) -> bool:
        """Whether all latents are in the cache."""
        return (self.folder / "key.json").is_file()

    def build(
        self, items: Iterable[T], encode: Callable[[Sequence[T]], Sequence[Tensor | None]], total: int | None = None
    ) -> None:
        """Make the missing latents, with a progress bar.

        Args:
            items: all items in order; they may be read lazily, since only one shard's items are in memory.
            encode: gives the latents (C, h, w) of each item, None for an item without latents.
            total: number of items, for the progress bar.
        """
        if self.complete:
            return
        count = 0
        with Meter("Caching latents", total, unit="image", shown=self.rank == 0) as meter:
            for number, block in enumerate(_blocks(items, self.shard_size)):
                if number % self.world_size == self.rank and not self._path(number).is_file():
                    self._write(number, encode(block))
                count += len(block)
                meter.update(len(block))
        self.barrier("latents of all processes")
        if self.rank == 0:
            with atomic_write(self.folder / "key.json") as temporary:
                temporary.write_text(json.dumps({"key": self.key, "items": count}, indent=2, default=_as_json))
        self.barrier("key of the latents")

    def __getitem__(self, index: int) -> Tensor | None:
        """Latents (C, h, w) float32 of an item, None if it has none.

        Raises:
            UserError: if the shard is missing or damaged.
        """
        number, place = divmod(index, self.shard_size)
        shard, rows = self._shard(number)
        row = int(rows[place])
        if row < 0:
            return None
        latents: Tensor = shard.get_slice("latents")[row : row + 1]
        return latents[0].float()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def _write(self, number: int, latents: Sequence[Tensor | None]) -> None:
        present = [row for row in latents if row is not None]
        numbers = itertools.count()
        rows = [-1 if row is None else next(numbers) for row in latents]
        stacked = torch.stack(present) if present else torch.empty(0)
        tensors = {"latents": stacked.to("cpu", self.dtype).contiguous(), "rows": torch.tensor(rows)}
        with atomic_write(self._path(number)) as temporary:
            save_file(tensors, temporary)

    def _open_shard(self, number: int) -> tuple[Any, Tensor]:
        path = self._path(number)
        try:
            shard: Any = safe_open(path, framework="pt")
            return shard, shard.get_tensor("rows")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot read cached latents '{path}' ({reason_of(error)}); delete the folder '{self.folder}' to make "
                "them again"
            ) from None


def build_latents(
    trainer: L.Trainer,
    settings: LatentCaching,
    key: Mapping[str, Any],
    items: Iterable[T],
    encode: Callable[[Sequence[T]], Sequence[Tensor | None]],
    *,
    total: int | None = None,
) -> LatentCache:
    """A cache with all latents, made as a training step makes them: without gradient, in the training's precision.

    Args:
        trainer: its processes share the work, and its precision is part of the key.
        settings: where and how to cache.
        key: see :class:`LatentCache`.
        items: see :meth:`LatentCache.build`.
        encode: see :meth:`LatentCache.build`.
        total: see :meth:`LatentCache.build`.
    """
    cache = LatentCache(
        settings,
        {**key, "precision": trainer.precision},
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        barrier=trainer.strategy.barrier,
    )
    with torch.no_grad(), trainer.precision_plugin.train_step_context():
        cache.build(items, encode, total)
    return cache


def in_full_batches(function: Callable[[list[T]], Tensor], items: Iterable[T], batch_size: int) -> Iterator[Tensor]:
    """Results for items, computed in batches of exactly ``batch_size``.

    Kernels are chosen by the shape of a batch, and differ in the last bits. With the batch size of the training, and
    the last batch filled up with copies, an item's result is the same as in any training batch.

    Args:
        function: gives (B, ...) results for B items.
        items: any number of items, read as they are needed.
        batch_size: items per call.

    Yields:
        The result of each item, on the CPU.
    """
    for batch in _blocks(items, batch_size):
        filled = batch + batch[-1:] * (batch_size - len(batch))
        yield from function(filled)[: len(batch)].cpu()


def weights_hash(module: nn.Module) -> str:
    """Hash of a module's state and configuration."""
    digest = hashlib.blake2b(str(sorted(dict(getattr(module, "config", {})).items())).encode(), digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def json_hash(value: Any) -> str:  # noqa: ANN401 - any value
    """Short hash of a value, whatever the order of keys in it; modules count by their weights and settings."""
    text = json.dumps(value, sort_keys=True, default=_as_json)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _as_json(value: Any) -> Any:  # noqa: ANN401 - as above
    """A value of another type than JSON's, such as a guidance rule's objective."""
    if not isinstance(value, nn.Module):
        return str(value)
    settings = {
        f"{name}.{key}": str(setting)
        for name, module in value.named_modules()
        for key, setting in vars(module).items()
        if not key.startswith("_") and (isinstance(setting, _SETTINGS) or is_dataclass(setting))
    }
    return [type(value).__name__, settings, weights_hash(value)]


def _blocks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while block := list(itertools.islice(iterator, size)):
        yield block
