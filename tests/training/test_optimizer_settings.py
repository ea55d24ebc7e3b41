import math

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau

from tokenlearn.errors import UserError
from tokenlearn.training.optimizer_settings import apply_changes, changes, settings_of


def stepped(optimizer, scheduler=None, steps=3):
    """A checkpoint after steps."""
    for _ in range(steps):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return {
        "global_step": steps,
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [] if scheduler is None else [scheduler.state_dict()],
    }


def adamw(**options):
    return AdamW([torch.nn.Parameter(torch.zeros(2))], **options)


def test_settings_are_those_of_the_beginning():
    optimizer = adamw(lr=0.1)
    scheduler = CosineAnnealingLR(optimizer, T_max=9)
    settings = settings_of(optimizer, scheduler)
    assert (settings["optimizer"]["class"], settings["optimizer"]["lr"]) == ("AdamW", 0.1)
    assert settings["optimizer"]["betas"] == [0.9, 0.999]
    assert (settings["lr_scheduler"]["class"], settings["lr_scheduler"]["T_max"]) == ("CosineAnnealingLR", 9)
    again = adamw(lr=0.1)
    assert changes(settings, settings_of(again, CosineAnnealingLR(again, T_max=9))) == []
    assert changes(settings, settings_of(adamw(lr=0.2, betas=(0.5, 0.999)), None)) == [
        "model.optimizer.lr is 0.2, was 0.1",
        "model.optimizer.betas is [0.5, 0.999], was [0.9, 0.999]",
        "model.lr_scheduler is None, was CosineAnnealingLR",
    ]


def test_changed_settings_hold_with_the_moments_of_before():
    old = settings_of(adamw(lr=0.1), None)
    checkpoint = stepped(adamw(lr=0.1))
    moments = checkpoint["optimizer_states"][0]["state"]
    new = adamw(lr=0.3)
    apply_changes(checkpoint, old, new, CosineAnnealingLR(new, T_max=6))
    loaded = adamw(lr=0.3)
    scheduler = CosineAnnealingLR(loaded, T_max=6)
    loaded.load_state_dict(checkpoint["optimizer_states"][0])
    scheduler.load_state_dict(checkpoint["lr_schedulers"][0])
    assert loaded.param_groups[0]["lr"] == pytest.approx(0.15 * (1 + math.cos(math.pi * 3 / 6)))
    assert scheduler.last_epoch == 3
    assert torch.equal(loaded.state_dict()["state"][0]["exp_avg"], moments[0]["exp_avg"])


def test_another_class_begins_without_moments():
    checkpoint = stepped(adamw(lr=0.1))
    old = settings_of(adamw(lr=0.1), None)
    new = SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0, momentum=0.9)
    assert changes(old, settings_of(new, None)) == ["model.optimizer is SGD, was AdamW"]
    apply_changes(checkpoint, old, new, None)
    assert checkpoint["optimizer_states"][0]["state"] == {}
    new.load_state_dict(checkpoint["optimizer_states"][0])
    assert checkpoint["lr_schedulers"] == []


def test_a_schedule_that_is_over_is_refused():
    checkpoint, new = stepped(adamw(lr=0.1), steps=5), adamw(lr=0.1)
    with pytest.raises(UserError, match=r"model.lr_scheduler is over .* step 5 "):
        apply_changes(checkpoint, settings_of(adamw(lr=0.1), None), new, OneCycleLR(new, max_lr=1.0, total_steps=3))


def test_a_schedule_of_plateaus_begins_anew():
    checkpoint, new = stepped(adamw(lr=0.1)), adamw(lr=0.3)
    plateaus = ReduceLROnPlateau(adamw(lr=0.1), patience=4)
    apply_changes(checkpoint, settings_of(adamw(lr=0.1), plateaus), new, ReduceLROnPlateau(new, patience=2))
    scheduler = ReduceLROnPlateau(adamw(lr=0.3), patience=9)
    scheduler.load_state_dict(checkpoint["lr_schedulers"][0])
    assert (scheduler.patience, scheduler.num_bad_epochs, scheduler.best) == (2, 0, math.inf)
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 0.3
