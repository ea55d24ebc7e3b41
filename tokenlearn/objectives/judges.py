"""The rule that a judge is another model than the guide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from tokenlearn.errors import UserError
from tokenlearn.losses.objective import Objective
from tokenlearn.models.frozen import FrozenModule
from tokenlearn.paths import resolve


def is_same_model(name: str, other: str) -> bool:
    """Whether two names or folders, in any spelling, mean one model."""
    if name == other:
        return True
    folder, other_folder = (Path(resolve(model)).expanduser() for model in (name, other))
    return other_folder.is_dir() and other_folder.resolve() == folder.resolve()


def have_same_weights(network: nn.Module, other: nn.Module) -> bool:
    """Whether two networks hold the same weights to half precision, in which classifiers are saved.

    Copies of a model have other names, so only what is in them tells that they are one.
    """
    weights, others = network.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(
        tensor.shape == others[name].shape and torch.equal(tensor.half(), others[name].to(tensor.device).half())
        for name, tensor in weights.items()
    )


def require_judge_differs(judge: Objective, guide: Objective) -> None:
    """Refuse a judge that shares a model with the objective that guides, or has a copy of it.

    Raises:
        UserError: naming the model.
    """
    for model in judge.models():
        for guiding in guide.models():
            if is_same_model(model, guiding):
                raise UserError(f"the judge '{model}' is also the guide '{guiding}'; name another model as the judge")
    for network in _networks(judge):
        for guiding_network in _networks(guide):
            if have_same_weights(network, guiding_network):
                raise UserError(
                    f"the judge '{network.pretrained}' has the weights of the guide '{guiding_network.pretrained}'; "
                    "name another model as the judge"
                )


def _networks(module: nn.Module) -> Iterator[FrozenModule]:
    """The frozen networks in an objective, each with the networks that are its parts."""
    for child in module.children():
        if isinstance(child, FrozenModule):
            yield child
        else:
            yield from _networks(child)
