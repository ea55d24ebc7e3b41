"""Base of evaluations: a protocol that measures a task, and makes a table of the measurements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import lightning as L

from tokenlearn.data.interfaces import TaskWrapper
from tokenlearn.data.skipped_images import SkippedImages
from tokenlearn.errors import UserError
from tokenlearn.evaluation.image_rows import ImageRows
from tokenlearn.evaluation.records import Record, Records
from tokenlearn.evaluation.table import Table
from tokenlearn.token_task import TokenTask

Task = TypeVar("Task", bound=TokenTask)


class Evaluation(L.LightningModule, TaskWrapper, Generic[Task], ABC):
    """A protocol that measures a task: run it by ``Trainer.test(evaluation.of(task))`` or ``tokenlearn test``.

    It wraps the task, so that a checkpoint of the task loads into the evaluation. A protocol adds long records in
    :meth:`test_step`, and makes a table of the records of all processes in :meth:`make_table`.

    Attributes:
        task_class: class of the tasks that the protocol measures.
        records: measurements so far.
        image_rows: example images so far.
        table: the table, None before the end of the evaluation.
    """

    task_class: ClassVar[type[TokenTask]] = TokenTask

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # as of the task, which checks checkpoints itself
        self.records, self.image_rows = Records(), ImageRows()
        self.table: Table | None = None
        self._task: Task | None = None

    def of(self, task: TokenTask) -> Self:
        """This evaluation, of a task.

        Raises:
            UserError: if the protocol measures tasks of another class.
        """
        if not isinstance(task, self.task_class):
            raise UserError(
                f"{type(self).__name__} evaluates {self.task_class.__name__}, not {type(task).__name__}; set "
                "evaluation.class_path to another class"
            )
        self._task = cast(Task, task)
        return self

    @property
    def task(self) -> Task:
        """The measured task."""
        if self._task is None:
            raise RuntimeError(f"{type(self).__name__} has no task yet; call of(task)")
        return self._task

    def wrapped_task(self) -> Task:
        """See :class:`tokenlearn.data.interfaces.TaskWrapper`."""
        return self.task

    @property
    def evaluate_after_fit(self) -> bool:
        """Whether the evaluation can follow every fit of the task, because it is quick and has all that it needs."""
        return False

    @abstractmethod
    def make_table(self, records: list[Record]) -> Table:
        """The table of the records of all processes; title, columns, rows and summary."""

    def configure_callbacks(self) -> list[L.Callback]:
        """The callback that warns once of skipped images, with any trainer."""
        return SkippedImages.for_run(self._trainer)

    def on_test_start(self) -> None:
        """Forget earlier measurements."""
        self.records.reset()
        self.image_rows, self.table = ImageRows(), None

    def on_test_epoch_end(self) -> None:
        """Make the table and log its summary."""
        records = self.records.compute()
        self.image_rows.gather()
        self.table = self.make_table(records)
        self.table.records = records
        summary = {f"test/{name}": figure.value for name, figure in self.table.summary.items()}
        self.log_dict(summary, rank_zero_only=True)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - overloaded in nn.Module
        """The task's state."""
        return self.task.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401 - a private type of torch
        """Load the task's state."""
        return self.task.load_state_dict(state_dict, strict, assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :class:`tokenlearn.token_task.TokenTask`."""
        self.task.on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :class:`tokenlearn.token_task.TokenTask`."""
        self.task.on_load_checkpoint(checkpoint)
