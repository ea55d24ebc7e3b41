"""When schedules of the learning rate are stepped."""

import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau as NamedPlateau
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from tokenlearn.errors import UserError
from tokenlearn.training.learning_rate import lr_schedule

MONITOR = ("val/guided_accuracy", "max")


@pytest.fixture
def optimizer():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


def test_schedules_of_steps_are_stepped_with_the_optimizer(optimizer):
    scheduler = StepLR(optimizer, 3)
    assert lr_schedule(scheduler, MONITOR, 1) == {"scheduler": scheduler, "interval": "step"}


@pytest.mark.parametrize(("epochs", "frequency"), [(1, 1), (4, 4), (None, 1)])
def test_a_plateau_is_of_the_figure_of_the_task_at_each_validation(optimizer, epochs, frequency):
    scheduler = ReduceLROnPlateau(optimizer, mode="max")
    assert lr_schedule(scheduler, MONITOR, epochs) == {
        "scheduler": scheduler,
        "interval": "epoch",
        "frequency": frequency,
        "monitor": "val/guided_accuracy",
    }


def test_a_plateau_of_another_figure(optimizer):
    scheduler = NamedPlateau(optimizer, monitor="train/loss")
    assert lr_schedule(scheduler, MONITOR, 1)["monitor"] == "train/loss"


def test_the_wrong_direction_is_refused(optimizer):
    with pytest.raises(UserError, match="set its mode to 'max'"):
        lr_schedule(ReduceLROnPlateau(optimizer), MONITOR, 1)
