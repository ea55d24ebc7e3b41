"""Generated images as files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image

from tokenlearn.callbacks.images import save_image, sheet, to_image
from tokenlearn.callbacks.origins import origin_of, say_what_is_not_of_the_run
from tokenlearn.callbacks.run_folder import common_run_folder
from tokenlearn.data.images_to_edit import generated_name
from tokenlearn.data.prompts import PromptList
from tokenlearn.errors import check_at_least
from tokenlearn.generation.results import BatchStore, EditTask, GeneratedBatch
from tokenlearn.provenance import Origin, key_of_image


class PredictionWriter(BasePredictionWriter, BatchStore):
    """Write each generated image as PNG to ``images/`` of the run folder as soon as it is there, then a contact sheet.

    Prediction steps return a :class:`tokenlearn.generation.results.GeneratedBatch`; other predictions are ignored. A
    batch whose images are all there already, made with the same settings and tokens, is not generated again, so an
    interrupted run continues with the same ``--output_dir``.

    Args:
        columns: images per row of the contact sheet at most.
        overwrite: generate all images again.

    Attributes:
        config: the run's config, for the text chunks of the images.
        expected: what an image that is made again says about itself; None otherwise.

    Raises:
        UserError: if there would be no column.
    """

    def __init__(self, columns: int = 8, overwrite: bool = False) -> None:
        check_at_least("predictions", 1, columns=columns)
        literal: Literal["batch"] = "batch"
        super().__init__(write_interval=literal)
        self.columns, self.overwrite = columns, overwrite
        self.config: Mapping[str, Any] = {}
        self.expected: Mapping[str, Any] | None = None
        self._run_folder = Path()
        self._module: L.LightningModule | None = None
        self._samples: dict[str, tuple[str, int]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Agree on the run folder."""
        self._run_folder = common_run_folder(trainer)
        self._module = pl_module
        self.__dict__.pop("_origin", None)
        data = getattr(trainer, "datamodule", None)
        self._samples = {}
        if isinstance(data, PromptList):
            samples = ((index, prompt, seed) for index, prompt in enumerate(data.prompts) for seed in data.seeds)
            self._add(samples)

    @cached_property
    def _origin(self) -> Origin:
        """Known once the tokens are loaded."""
        assert self._module is not None
        return origin_of(self._module, self.config, self.expected)

    def is_batch_done(self, prompts: Sequence[str], seeds: Sequence[int], indices: Sequence[int]) -> bool:
        """See :class:`tokenlearn.generation.results.BatchStore`."""
        return not self.overwrite and all(map(self._is_there, self._add(zip(indices, prompts, seeds, strict=True))))

    def progress(self) -> tuple[int, int] | None:
        """How many images are there, and how many there will be; None if the task makes none for this callback."""
        if self._module is None or isinstance(self._module, EditTask):
            return None
        return sum(map(self._is_there, self._samples)), len(self._samples)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,  # noqa: ANN401 - Lightning's hook
        batch_indices: Sequence[int] | None,
        batch: Any,  # noqa: ANN401 - Lightning's hook
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write a batch of images."""
        if not isinstance(prediction, GeneratedBatch):
            return
        names = self._add(zip(prediction.indices, prediction.prompts, prediction.seeds, strict=True))
        for name, tensor in zip(names, prediction.images, strict=True):
            prompt, seed = self._samples[name]
            image = to_image(tensor)
            info = self._origin.png_info(
                self._key(name), prompt=prompt, seed=seed, size=image.size, batch_size=len(prediction.images)
            )
            save_image(image, self._path(name), info)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the contact sheet, a row per prompt."""
        trainer.strategy.barrier("images of all processes")
        if not trainer.is_global_zero or isinstance(pl_module, EditTask):
            return
        rows: dict[str, list[Path]] = {}
        for name in sorted(self._samples, key=_prompt_and_seed):
            if self._is_there(name):  # the run may be limited to fewer batches
                rows.setdefault(name.rsplit("-seed", 1)[0], []).append(self._path(name))
        if rows:
            images = [
                (name.split("-", 1)[1].replace("-", " "), [Image.open(path) for path in paths[: self.columns]])
                for name, paths in rows.items()
            ]
            info = self._origin.png_info(self._origin.key("sheet"))
            save_image(sheet(images), self._run_folder / "contact_sheet.png", info)
            say_what_is_not_of_the_run(self._run_folder, ["images"], map(self._path, self._samples))

    def _add(self, samples: Iterable[tuple[int, str, int]]) -> list[str]:
        """Names of images, which the run knows from now on."""
        named = [(generated_name(index, prompt, seed), (prompt, seed)) for index, prompt, seed in samples]
        self._samples.update(named)
        return [name for name, _ in named]

    def _path(self, name: str) -> Path:
        return self._run_folder / "images" / f"{name}.png"

    def _key(self, name: str) -> str:
        prompt, seed = self._samples[name]
        return self._origin.key(f"{seed} {prompt}")

    def _is_there(self, name: str) -> bool:
        return key_of_image(self._path(name)) == self._key(name)


def _prompt_and_seed(name: str) -> tuple[str, int]:
    prompt, seed = name.rsplit("-seed", 1)
    return prompt, int(seed)
