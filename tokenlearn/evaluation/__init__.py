"""Evaluations of tasks: protocols, rivals, long records and the tables made of them."""

from __future__ import annotations

from typing import Any

import lightning as L

from tokenlearn.errors import UserError
from tokenlearn.evaluation.attribute_edits import AttributeEdits
from tokenlearn.evaluation.augmentation import AugmentationEvaluation
from tokenlearn.evaluation.base import Evaluation
from tokenlearn.evaluation.class_accuracy import ClassTokenEvaluation
from tokenlearn.evaluation.classifier_report import ClassifierReport
from tokenlearn.evaluation.doodl import DoodlEvaluation
from tokenlearn.evaluation.sega import SegaEvaluation
from tokenlearn.evaluation.table import Table
from tokenlearn.token_task import TokenTask

__all__ = [
    "AttributeEdits",
    "AugmentationEvaluation",
    "ClassTokenEvaluation",
    "ClassifierReport",
    "DoodlEvaluation",
    "Evaluation",
    "SegaEvaluation",
    "Table",
    "evaluates",
    "evaluation_of",
]

_DEFAULTS: tuple[type[Evaluation[Any]], ...] = (ClassTokenEvaluation, AttributeEdits)


def evaluates(task: type) -> bool:
    """Whether a class of tasks has an evaluation, or is one."""
    return issubclass(task, (Evaluation, *(default.task_class for default in _DEFAULTS)))


def evaluation_of(task: L.LightningModule, evaluation: Evaluation[Any] | None = None) -> Evaluation[Any]:
    """The evaluation of a task: a given one, or the default of the task's class.

    Args:
        task: a task that learns tokens, or an evaluation that has its task, which is returned.
        evaluation: evaluation without a task; None for the default.

    Raises:
        UserError: if there is no evaluation of the task's class, or the given one does not suit it.
    """
    if isinstance(task, Evaluation):
        if evaluation is not None:
            raise UserError(
                f"model.class_path {type(task).__name__} is an evaluation already; remove the section evaluation"
            )
        return task
    if evaluation is not None and isinstance(task, TokenTask):
        return evaluation.of(task)
    for default in _DEFAULTS:
        if isinstance(task, default.task_class):
            return default().of(task)
    names = ", ".join(default.task_class.__name__ for default in _DEFAULTS)
    raise UserError(
        f"there is no evaluation of {type(task).__name__}, only of {names}; set model.class_path to one of these, to "
        "SegaEvaluation or to DoodlEvaluation"
    )
