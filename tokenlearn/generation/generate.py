"""Generate images of prompts with learned tokens."""

from __future__ import annotations

from tokenlearn.data.batches import PromptBatch
from tokenlearn.data.interfaces import WholePrompts, find_data
from tokenlearn.generation.results import GeneratedBatch
from tokenlearn.models import DiffusionBackbone
from tokenlearn.pipeline import Sampling, finished
from tokenlearn.token_task import TokenTask
from tokenlearn.tokens import Embeddings


class Generate(TokenTask):
    """Generates images of prompts that use tokens, from embedding files or a checkpoint (``--ckpt_path``).

    Args:
        backbone: frozen diffusion model.
        embeddings: embedding files, see :func:`tokenlearn.tokens.load_bank`. The tokens of a checkpoint replace them.
        sampling: settings of the sampler.

    Raises:
        UserError: if a file cannot be read, has vectors of another width or for another model, or names a token twice.
    """

    takes_checkpoint_tokens = True

    def __init__(
        self,
        backbone: DiffusionBackbone,
        *,
        embeddings: Embeddings = [],  # noqa: B006 - read only; a list is what YAML shows
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(backbone, sampling)
        self.load_embeddings(embeddings)

    def on_predict_start(self) -> None:
        """Check the tokens of all prompts before the first image.

        Raises:
            UserError: if a prompt has a token that is not loaded.
        """
        data = find_data(self.trainer, WholePrompts)
        if data is not None:
            self.check_prompts(data.prompts)

    def predict_step(self, batch: PromptBatch) -> GeneratedBatch:
        """Images of a batch of prompts and seeds.

        Raises:
            UserError: if an image is not finite.
        """
        images = finished(self.pipeline.generate(batch.templates, batch.seeds))
        return GeneratedBatch(images, batch.templates, batch.seeds, batch.class_indices)
