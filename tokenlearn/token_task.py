"""Base of every task of the Trainer: a frozen backbone, a token bank, and checkpoints of the bank alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from tokenlearn.data.interfaces import ImageConsumer
from tokenlearn.data.latent_cache import weights_hash
from tokenlearn.data.skipped_images import SkippedImages
from tokenlearn.errors import UserError
from tokenlearn.models import DiffusionBackbone
from tokenlearn.pipeline import Pipeline, Sampling
from tokenlearn.tokens import Embeddings, TokenBank, load_bank, vocabulary_hash
from tokenlearn.tokens.checkpoint import CHECKPOINT_KEY, checkpoint_about
from tokenlearn.tokens.compatibility import VOCABULARY, check_vocabularies, fingerprint
from tokenlearn.tokens.embeddings import tokens_by_setting
from tokenlearn.tokens.files.base import ENCODERS_ENTRY

OF_TASK = "task"
"""Setting of a monitor that stands for the task's own, see :attr:`TokenTask.monitor`."""


class TokenTask(L.LightningModule, ImageConsumer):
    """A task with a frozen backbone and the tokens of a bank.

    Its state is the bank: checkpoints hold a few kilobytes, and the identity of the backbone that they belong to.

    Args:
        backbone: frozen diffusion model.
        sampling: settings of the sampler.

    Attributes:
        backbone: as given.
        bank: token bank, None until tokens are known.
        pipeline: backbone, bank and settings of the sampler: what generates images.
        vocabulary_hash: fingerprint of the backbone's vocabulary.
        takes_checkpoint_tokens: whether the tokens of a checkpoint replace the task's.
        checks_vocabulary: whether to say where tokens were learned beside other words than the backbone's.
    """

    takes_checkpoint_tokens = False
    bank: TokenBank | None

    def __init__(self, backbone: DiffusionBackbone, sampling: Sampling) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold the bank only; on_load_checkpoint checks that they do
        self.backbone = backbone
        self.bank = None
        self.checks_vocabulary = True
        self._loaded_together: list[tuple[str, ...]] = []
        self.vocabulary_hash = vocabulary_hash(backbone.text_encoders[0])
        backbone.make_solver(sampling.solver, sampling.steps)  # refuses now what would fail at the first image
        self.pipeline = Pipeline(backbone, sampling=sampling)

    @property
    def sampling(self) -> Sampling:
        """Settings of the sampler."""
        return self.pipeline.sampling

    @property
    def monitor(self) -> tuple[str, Literal["max", "min"]]:
        """Name of the logged figure by which the best tokens are chosen, and whether it should grow or shrink."""
        return "val/guided_accuracy", "max"

    def watched(self, monitor: str | None, mode: str, section: str) -> tuple[str | None, str]:
        """Figure that settings choose the best tokens by, and whether it should grow or shrink.

        Args:
            monitor: name of a logged figure, :data:`OF_TASK` for :attr:`monitor`, or None for none.
            mode: whether it should grow or shrink, unless the figure is left to the task.
            section: section of the settings, for messages.

        Raises:
            UserError: if the settings name the task's figure, but would keep the worst tokens by it.
        """
        figure, best = self.monitor
        if monitor == OF_TASK:
            return figure, best
        if monitor == figure and mode != best:
            raise UserError(
                f"{section}.monitor '{figure}' with {section}.mode {mode} would keep the worst tokens; set "
                f"{section}.mode to {best}, or leave both out"
            )
        return monitor, mode

    def configure_callbacks(self) -> list[L.Callback]:
        """The callback that warns once of skipped images, with any trainer."""
        return SkippedImages.for_run(self._trainer)

    def use_bank(self, bank: TokenBank) -> None:
        """Make the bank this task's state and its placeholders part of prompts."""
        self.bank = bank
        self.pipeline = Pipeline(self.backbone, tokens=bank, sampling=self.sampling)
        # The frozen stack is the same on all ranks, so DDP neither broadcasts nor watches it.
        frozen = [*self.named_parameters(), *self.named_buffers()]
        names = [name for name, _ in frozen if not name.startswith("bank.")]
        self._ddp_params_and_buffers_to_ignore = names

    def load_embeddings(self, embeddings: Embeddings, check_vocabulary: bool = True) -> None:
        """Make the tokens of embedding files this task's bank; none leaves it without tokens.

        Args:
            embeddings: the files.
            check_vocabulary: whether to say where these, or a checkpoint, were learned beside other words.

        Raises:
            UserError: if a file cannot be read, or has vectors of another width.
        """
        self.checks_vocabulary = check_vocabulary
        if embeddings:
            tables = self.backbone.word_tables if check_vocabulary else None
            bank, files = load_bank(embeddings, self.backbone.embedding_widths, tables)
            self.use_bank(bank)
            self._loaded_together = tokens_by_setting(embeddings, files)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts with tokens that are not loaded, and warn of loaded tokens that no prompt has.

        Of the tokens of a folder or a checkpoint, one that is used is enough.

        Args:
            prompts: all prompts of the run, but the negative prompt and the concepts of the settings' guidance.

        Raises:
            UserError: naming the first token that is not loaded.
        """
        given = [*prompts, self.sampling.negative_prompt, *self.sampling.rule.concept_prompts]
        self.pipeline.check_prompts(given)
        text = "\n".join(given).casefold()
        for tokens in self._loaded_together:
            if not any(token.casefold() in text for token in tokens):
                names = ", ".join(tokens[:6]) + (f" and {len(tokens) - 6} more" if len(tokens) > 6 else "")
                rank_zero_warn(f"no prompt uses the loaded {names}; write a token into a prompt as it is spelled here")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - overloaded in nn.Module
        """The bank's state only."""
        if self.bank is None:
            return {}
        prefix = kwargs.get("prefix", "")
        return self.bank.state_dict(prefix=f"{prefix}bank.")

    def token_metadata(self) -> dict[str, dict[str, str]]:
        """Placeholder to the entries of its embedding file besides its vectors."""
        assert self.bank is not None
        common = {
            "base_model": self.backbone.pretrained,
            "vocabulary_hash": self.vocabulary_hash,
            ENCODERS_ENTRY: ",".join(self.backbone.encoders),
        }
        return {
            placeholder: {**common, VOCABULARY: self._fingerprint(placeholder)}
            for placeholder in self.bank.placeholders
        }

    def _fingerprint(self, placeholder: str) -> str:
        """What a token's file says about the words beside which it was learned."""
        assert self.bank is not None
        vectors = self.bank.get(placeholder) if self.bank.spaces[placeholder] == "input" else []
        return fingerprint(self.backbone.word_tables, placeholder, vectors)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add which backbone and tokens the state is for, and the state of random number generators."""
        assert self.bank is not None
        checkpoint[CHECKPOINT_KEY] = {
            "base_model": self.backbone.pretrained,
            "vocabulary_hash": self.vocabulary_hash,
            "num_vectors": dict(self.bank.num_vectors),
            "embedding_widths": list(self.bank.embedding_widths),
            "spaces": dict(self.bank.spaces),
            "metadata": self.token_metadata(),
        }
        checkpoint["rng"] = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another backbone or without tokens; restore random number generators.

        A task that :attr:`takes_checkpoint_tokens` gets a bank for them, and says where they were learned beside other
        words; a training goes on on the same backbone alone.

        Raises:
            UserError: if it is for another backbone or holds no tokens.
        """
        about = checkpoint_about(checkpoint)
        found, expected = list(about["embedding_widths"]), list(self.backbone.embedding_widths)
        if found not in (expected, list(self.backbone.output_widths)):
            raise UserError(
                f"the checkpoint's tokens have the widths {found}, the text encoders of '{self.backbone.pretrained}' "
                f"have {expected}; set model.backbone to the model of the checkpoint, '{about['base_model']}'"
            )
        if self.takes_checkpoint_tokens:
            if self.checks_vocabulary:
                base = {key: about[key] for key in ("base_model", "vocabulary_hash")}
                learned = [(token, base | about["metadata"].get(token, {})) for token in about["num_vectors"]]
                check_vocabularies(learned, self.backbone.word_tables)
        elif about["vocabulary_hash"] != self.vocabulary_hash:
            raise UserError(
                f"the checkpoint's tokens were learned on '{about['base_model']}', whose text encoder differs from "
                f"that of '{self.backbone.pretrained}'; set model.backbone to the model of the checkpoint"
            )
        spaces = about.get("spaces") or dict.fromkeys(about["num_vectors"], "input")
        if self.bank is not None and not self.takes_checkpoint_tokens and spaces != self.bank.spaces:
            stored, here = (", ".join(dict.fromkeys(item.values())) for item in (spaces, self.bank.spaces))
            raise UserError(
                f"the tokens of the checkpoint are of the space {stored}, those of this run of {here}; set "
                f"model.tokens.space to {stored}, or leave out --ckpt_path"
            )
        if "rng" in checkpoint:
            torch.set_rng_state(checkpoint["rng"]["cpu"].cpu())
            if len(checkpoint["rng"]["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all([state.cpu() for state in checkpoint["rng"]["cuda"]])
        if self.takes_checkpoint_tokens:
            self.use_bank(TokenBank(about["num_vectors"], about["embedding_widths"], spaces).to(self.device))
            self._loaded_together = [tuple(about["num_vectors"])]

    @property
    def image_size(self) -> int:
        """See :class:`ImageConsumer`: that of ``sampling.size``, or the size the model was trained for.

        Raises:
            UserError: if ``sampling.size`` is not square, as images of data are.
        """
        if self.sampling.size is None:
            return self.backbone.latent_size * self.backbone.vae_scale_factor
        height, width = self.sampling.size
        if height != width:
            raise UserError(
                f"model.sampling.size {height}x{width} is not square, as images of data are; set data.images.size"
            )
        return height

    @property
    def size_multiple(self) -> int:
        """See :class:`ImageConsumer`."""
        return self.backbone.vae_scale_factor

    @property
    def learned_placeholders(self) -> Sequence[str]:
        """See :class:`ImageConsumer`."""
        return () if self.bank is None else self.bank.placeholders

    def encode_images(self, images: Tensor) -> Tensor:
        """See :class:`ImageConsumer`."""
        return self.backbone.encode_images(images.to(self.backbone.device))

    def generate_latents(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """See :class:`ImageConsumer`."""
        return self.pipeline.generate_latents(prompts, seeds)

    def encoder_key(self) -> dict[str, Any]:
        """See :class:`ImageConsumer`."""
        encoder: Any = getattr(self.backbone, "vae", self.backbone)
        return {"model": self.backbone.pretrained, "weights": weights_hash(encoder)}

    def sampling_key(self) -> dict[str, Any]:
        """See :class:`ImageConsumer`."""
        sampling = self.sampling
        scheduler = self.backbone.make_scheduler(sampling.solver if isinstance(sampling.solver, str) else None)
        return {
            "model": self.backbone.pretrained,
            "weights": weights_hash(self.backbone),
            "scheduler": [type(scheduler).__name__, dict(scheduler.config)],
            "solver": repr(sampling.solver),
            "steps": sampling.steps,
            "guidance": [type(sampling.rule).__name__, vars(sampling.rule)],
            "negative_prompt": sampling.negative_prompt,
            "size": sampling.size,
        }
