"""Learning and evaluation in one call each, for notebooks and scripts: the trainer without files."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import lightning as L

from tokenlearn.data.interfaces import ClassConsumer
from tokenlearn.data.prompts import PromptDataModule
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.quiet import quiet
from tokenlearn.token_task import TokenTask
from tokenlearn.tokens import LearnedTokens

if TYPE_CHECKING:
    from tokenlearn.evaluation import Evaluation, Table

_TEMPLATES = ["a photo of a {}", "a portrait of a {}", "a picture of a {}"]


def learn(
    task: TokenTask,
    data: L.LightningDataModule | None = None,
    *,
    max_steps: int,
    gradient_clip_val: float | None = 1.0,
    **trainer: Any,  # noqa: ANN401 - arguments of the trainer
) -> LearnedTokens:
    """Train the tokens of a task and return them.

    Nothing is written and nothing validated; the command line does both. A second call trains on from the first one's
    tokens, with a new optimizer.

    Args:
        task: :class:`ClassTokens`, :class:`Caso`, :class:`TextualInversion` or another task with a ``training_step``.
        data: data to learn from; None for prompts from simple templates, where the task needs no more.
        max_steps: optimizer steps, at least 1.
        gradient_clip_val: norm that the gradient of each token is clipped to, as in the configs of this package; None
            for none.
        trainer: further arguments of ``lightning.Trainer``, such as ``accelerator`` or ``callbacks``.

    Returns:
        The tokens after the last step, a copy.

    Raises:
        UserError: if the task needs data, or an argument is out of range.
    """
    check_at_least("learn", 1, max_steps=max_steps)
    settings = {
        "max_steps": max_steps,
        "gradient_clip_val": gradient_clip_val,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
    }
    with quiet():
        _trainer(settings | trainer).fit(task, datamodule=_default_data(task) if data is None else data)
    assert task.bank is not None
    return LearnedTokens(copy.deepcopy(task.bank), task.token_metadata())


def evaluate(
    task: L.LightningModule,
    evaluation: Evaluation[Any] | None = None,
    data: L.LightningDataModule | None = None,
    **trainer: Any,  # noqa: ANN401 - arguments of the trainer
) -> Table:
    """Run the evaluation of a task and return its table.

    Args:
        task: task whose tokens are evaluated, or an evaluation that needs no task, such as :class:`SegaEvaluation`.
        evaluation: protocol and its settings; None for the task's default.
        data: prompts or images; None for prompts from simple templates, where the task needs no more.
        trainer: further arguments of ``lightning.Trainer``.

    Raises:
        UserError: if the task has no evaluation, or needs data.
    """
    from tokenlearn.evaluation import evaluation_of

    module = evaluation_of(task, evaluation)
    with quiet():
        _trainer(trainer).test(module, datamodule=_default_data(task) if data is None else data, verbose=False)
    assert module.table is not None
    return module.table


def _trainer(settings: dict[str, Any]) -> L.Trainer:
    files = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return L.Trainer(**files | settings)


def _default_data(task: L.LightningModule) -> L.LightningDataModule | None:
    """Prompts, for a task that learns from prompts alone."""
    if isinstance(task, ClassConsumer):
        return PromptDataModule(_TEMPLATES)
    if isinstance(task, TokenTask) and type(task).training_step is not L.LightningModule.training_step:
        raise UserError(f"{type(task).__name__} learns from images; give data, such as tl.ImageDataModule(folder)")
    return None
