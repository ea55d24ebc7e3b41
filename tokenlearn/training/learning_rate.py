"""When the trainer steps the schedule of a learning rate."""

from __future__ import annotations

from typing import Any, Literal

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tokenlearn.errors import UserError


def lr_schedule(
    scheduler: LRScheduler | ReduceLROnPlateau, monitor: tuple[str, Literal["max", "min"]], epochs: int | None
) -> dict[str, Any]:
    """The trainer's entry for a scheduler: stepped after every optimizer step; on a plateau, after every validation.

    Args:
        scheduler: schedule of the learning rate. Lightning's ``ReduceLROnPlateau`` names the figure that it watches,
            torch's watches that of the task.
        monitor: the task's figure, and whether it should grow or shrink.
        epochs: epochs from one validation to the next; None for validations that are counted in steps.

    Raises:
        UserError: if the scheduler would take the growth of the task's figure for its fall, or the reverse.
    """
    if not isinstance(scheduler, ReduceLROnPlateau):
        return {"scheduler": scheduler, "interval": "step"}
    figure, mode = monitor
    watched = getattr(scheduler, "monitor", figure)
    if watched == figure and scheduler.mode != mode:
        raise UserError(
            f"model.lr_scheduler ReduceLROnPlateau watches '{figure}' with mode '{scheduler.mode}'; set its mode to "
            f"'{mode}'"
        )
    return {"scheduler": scheduler, "interval": "epoch", "frequency": epochs or 1, "monitor": watched}
