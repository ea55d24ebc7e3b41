"""Generate images of prompts with learned tokens."""

from __future__ import annotations

import torch

from tokenlearn.data.batches import PromptBatch
from tokenlearn.data.interfaces import WholePrompts, find_data
from tokenlearn.generation.results import BatchStore, GeneratedBatch
from tokenlearn.models import DiffusionBackbone
from tokenlearn.pipeline import Sampling, finished
from tokenlearn.token_task import TokenTask
from tokenlearn.tokens import Embeddings


class Generate(TokenTask):
    """Generates images of prompts that use tokens, from embedding files or a checkpoint (``--ckpt_path``).

    Args:
        backbone: frozen diffusion model.
        embeddings: embedding files, see :func:`tokenlearn.tokens.load_bank`. The tokens of a checkpoint replace them.
        check_vocabulary: whether to say where tokens were learned beside other words than the backbone's; files of
            another width are refused in any case.
        sampling: settings of the sampler.

    Raises:
        UserError: if a file cannot be read, has vectors of another width, or names a token twice.
    """

    takes_checkpoint_tokens = True

    def __init__(
        self,
        backbone: DiffusionBackbone,
        *,
        embeddings: Embeddings = [],  # noqa: B006 - read only; a list is what YAML shows
        check_vocabulary: bool = True,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(backbone, sampling)
        self.load_embeddings(embeddings, check_vocabulary)

    def on_predict_start(self) -> None:
        """Check the tokens of all prompts before the first image.

        Raises:
            UserError: if a prompt has a token that is not loaded.
        """
        data = find_data(self.trainer, WholePrompts)
        if data is not None:
            self.check_prompts(data.prompts)

    def predict_step(self, batch: PromptBatch) -> GeneratedBatch:
        """Images of a batch of prompts and seeds; none if a callback of the trainer has stored them all.

        Raises:
            UserError: if an image is not finite.
        """
        # Part of a batch would be computed with other roundings than the whole.
        callbacks = [] if self._trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        stores = [callback for callback in callbacks if isinstance(callback, BatchStore)]
        if any(store.is_batch_done(batch.templates, batch.seeds, batch.class_indices) for store in stores):
            return GeneratedBatch(torch.empty(0, 3, 1, 1), [], [], [])
        images = finished(self.pipeline.generate(batch.templates, batch.seeds))
        return GeneratedBatch(images, batch.templates, batch.seeds, batch.class_indices)
