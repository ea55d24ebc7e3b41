"""The rule that a judge is another model than the guide."""

from __future__ import annotations

from pathlib import Path

from tokenlearn.errors import UserError
from tokenlearn.losses.objective import Objective
from tokenlearn.paths import resolve


def is_same_model(name: str, other: str) -> bool:
    """Whether two names or folders, in any spelling, mean one model."""
    if name == other:
        return True
    folder, other_folder = (Path(resolve(model)).expanduser() for model in (name, other))
    return other_folder.is_dir() and other_folder.resolve() == folder.resolve()


def require_judge_differs(judge: Objective, guide: Objective) -> None:
    """Refuse a judge that shares a model with the objective that guides.

    Raises:
        UserError: naming the model.
    """
    for model in judge.models():
        for guiding in guide.models():
            if is_same_model(model, guiding):
                raise UserError(f"the judge '{model}' is also the guide '{guiding}'; name another model as the judge")
