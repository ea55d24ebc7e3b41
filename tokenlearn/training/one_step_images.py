"""Training images that are predicted in one step from latents on the way, which serve for several batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenlearn.data.batches import PromptBatch
from tokenlearn.diffusion import OneStep, ReversibleSolver
from tokenlearn.guidance import Trajectory
from tokenlearn.pipeline import Pipeline
from tokenlearn.tokens import TokenBank


class OneStepImages:
    """Images of class tokens by :class:`tokenlearn.diffusion.OneStep`.

    Every ``reuse`` batches, latents are sampled for the prompts and seeds of the batch, with the tokens of the moment.
    The batches until the next time predict images from them, each from other noise levels.

    Args:
        gradient: settings.
        prompts: prompts (B) of a batch.

    Attributes:
        source: the batch whose latents are used, None before the first.
    """

    def __init__(self, gradient: OneStep, prompts: Callable[[PromptBatch], list[str]]) -> None:
        self.gradient, self._prompts = gradient, prompts
        self.source: PromptBatch | None = None
        self._vectors: list[Tensor] = []
        self._bank: TokenBank | None = None
        self._trajectory: Trajectory | None = None

    def images(
        self, pipeline: Pipeline, batch: PromptBatch, position: int, solver: str | ReversibleSolver | None = None
    ) -> tuple[Tensor, PromptBatch]:
        """Predicted images (B, 3, H, W), nominally in [0, 1], and the batch that they are of.

        Args:
            pipeline: backbone, tokens and settings of the sampler.
            batch: batch of the training stream.
            position: number of batches before it.
            solver: None for that of the pipeline.
        """
        assert pipeline.tokens is not None
        if self.source is None or position % self.gradient.reuse == 0:
            self.source, self._trajectory = batch, None
            self._vectors = [vector.detach().clone() for vector in pipeline.tokens.vectors]
        if self._trajectory is None:
            self._trajectory = self._sample(pipeline, self.source, solver)
        trajectory, source = self._trajectory, self.source
        generator = torch.Generator().manual_seed(batch.seeds[0])  # every batch of every process has other seeds
        indices = self.gradient.indices(trajectory.total, len(source.seeds), generator)
        model = pipeline.guided_model(pipeline.encode(self._prompts(source)))
        clean = trajectory.predict_clean(model, indices.to(trajectory.latents.device))
        return pipeline.backbone.decode_latents(clean), source

    @torch.no_grad()
    def _sample(self, pipeline: Pipeline, source: PromptBatch, solver: str | ReversibleSolver | None) -> Trajectory:
        """Latents on the way, with the tokens of when the batch was new, in a copy of the bank."""
        if self._bank is None:  # one copy for all batches, because the backbone makes tokenizers for each bank
            self._bank = copy.deepcopy(pipeline.tokens)
        assert self._bank is not None
        for vector, then in zip(self._bank.vectors, self._vectors, strict=True):
            vector.copy_(then)
        tokens_then = pipeline.with_tokens(self._bank)
        return tokens_then.sample_trajectory(
            self._prompts(source), source.seeds, solver=solver, share=self.gradient.end
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to sample the same latents again: the batch and the tokens, not the latents."""
        source = None if self.source is None else self.source._asdict()
        return {"source": source, "vectors": [vector.cpu() for vector in self._vectors]}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over the state of a checkpoint."""
        self.source = None if state["source"] is None else PromptBatch(**state["source"])
        self._vectors = [vector.to(device) for vector in state["vectors"]]
        self._trajectory = None
