"""Every setting of every method with a wrong type, null, a misspelling, a negative number and an empty value."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

import tokenlearn as tl
from tests.tiny import tiny_classifier, tiny_pipeline
from tokenlearn.callbacks import EmbeddingExport, ImageGrid, PredictionWriter, ReportWriter, ResultWriter
from tokenlearn.data.prompts import PromptList
from tokenlearn.diffusion import Gradient, ReversibleSolver
from tokenlearn.errors import UserError
from tokenlearn.evaluation import AttributeEdits, ClassTokenEvaluation, DoodlEvaluation, SegaEvaluation
from tokenlearn.evaluation.sega_settings import ConceptSettings
from tokenlearn.guidance import GuidanceRule
from tokenlearn.losses.objective import Objective, ObjectiveSum
from tokenlearn.setting_checks import Section, check_settings
from tokenlearn.setting_types import constructor_settings, elements, is_open, is_settings, members, subclasses

METHODS = [tl.ClassTokens, tl.Caso, tl.TextualInversion, tl.Generate, tl.Edit, tl.Sega, tl.Doodl]
SECTIONS = [
    *METHODS,
    *(ClassTokenEvaluation, AttributeEdits, SegaEvaluation, DoodlEvaluation),
    *(tl.PromptDataModule, PromptList, tl.ImageDataModule, tl.GeneratedDataModule),
    *(tl.StableDiffusion, tl.StableDiffusionXL, tl.DeepFloydIF),
    *(ModelCheckpoint, ImageGrid, EmbeddingExport, PredictionWriter, ResultWriter, ReportWriter),
]
FAMILIES = [Gradient, ReversibleSolver, Objective, GuidanceRule]
NONSENSE = {"nonsense": {"x": []}}
LONGEST = 700

MAY_BE_NEGATIVE = {
    "guidance": "points away from the prompt",
    "guidance_scale": "the same",
    "scale": "removes a concept",
    "weight": "turns an objective round",
    "rho": "the same",
    "mu": "the same",
    "target": "any score",
    "grad_scale": "turns the gradient round",
    "one_step_scale": "the same",
    "step": "turns the start round",
    "removal_scale": "the same as scale",
    "composable_scale": "the same as scale",
    "threshold": "no safety guidance anywhere",
    "timestep": "refused with the timesteps of the model",
    "timesteps": "refused with the timesteps of the model",
    "from_timestep": "refused with the timesteps of the model",
}
"""Settings of which a negative number has a meaning, or is refused only once the model is known."""


def settings_groups(targets: list[type]) -> list[type]:
    """Classes, and the groups of settings and families of classes below them."""
    found: list[type] = []
    pending = [*targets, *(cls for family in FAMILIES for cls in subclasses(family) if cls is not ObjectiveSum)]
    while pending:
        cls = pending.pop(0)
        if cls in found or not cls.__module__.startswith(("tokenlearn", "lightning")):
            continue
        found.append(cls)
        for parameter in (constructor_settings(cls) or {}).values():
            for member in members(parameter.annotation):
                pending += [kind for kind in (member, elements(member)) if is_settings(kind)]
    return found


GROUPS = settings_groups(SECTIONS)
CASES = [
    (cls, name)
    for cls in GROUPS
    for name, parameter in (constructor_settings(cls) or {}).items()
    if not is_open(parameter.annotation)
]


def refusal(cls: type, name: str, value: Any) -> str | None:
    """The line for a value of a setting; None if the value is taken."""
    section = Section(cls, named=not dataclasses.is_dataclass(cls))
    path = f"{cls.__module__}.{cls.__name__}"
    settings = {name: value}
    given = {"class_path": path, "init_args": settings} if section.named else settings
    required = [
        key
        for key, parameter in constructor_settings(cls).items()
        if parameter.default is inspect.Parameter.empty and key != name
    ]
    try:
        check_settings({"section": given}, {"section": section})
    except UserError as error:
        line = str(error)
        assert "\n" not in line
        assert len(line) < LONGEST
        missing = any(line.startswith(f"section.{key} is missing") for key in required)
        return None if missing else line  # what is missing is reported last
    return None


def mistakes(cls: type, name: str) -> Iterator[tuple[str, Any, list[str]]]:
    """Wrong settings for a setting: name, value, and what the line must say."""
    parameter = constructor_settings(cls)[name]
    yield name, NONSENSE, [f"section.{name}"]
    if type(None) not in members(parameter.annotation) and parameter.default is not None:
        yield name, None, [f"section.{name} must be", "got null"]
    misspelt = f"{name}{name[-1]}"
    yield misspelt, 1, [f"has no setting '{misspelt}'", "; ", name]


def fault_of(cls: type, name: str, value: Any, words: list[str]) -> str | None:
    """What is wrong with the answer to a wrong setting, None for one line that says the words."""
    try:
        line = refusal(cls, name, value)
    except Exception as error:  # what is tested for
        return f"{type(error).__name__}: {error}"
    if line is None:
        return "loaded"
    missing = [word for word in words if word not in line]
    return f"a line without {missing}: {line}" if missing else None


@pytest.mark.parametrize(("cls", "name"), CASES, ids=[f"{cls.__name__}-{name}" for cls, name in CASES])
def test_wrong_types_nulls_and_misspellings(cls: type, name: str, count_sweep: Callable):
    tried = list(mistakes(cls, name))
    faults = {f"{key}: {value!r}": fault_of(cls, key, value, words) for key, value, words in tried}
    failures = {case: fault for case, fault in faults.items() if fault is not None}
    count_sweep("settings: wrong types, nulls, misspellings", len(tried), failures)
    assert not failures


def test_the_sweep_is_of_every_setting():
    assert len(CASES) > 150
    assert set(METHODS) <= set(GROUPS)
    assert {"Sampling", "TokenSettings", "LastK", "EDICT", "ClassifierLoss", "SEGA"} <= {
        cls.__name__ for cls in GROUPS
    }


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Mapping[str, Any]:
    """Valid values of settings that have no default, by name."""
    folder = tmp_path_factory.mktemp("sweep")
    guide = tiny_classifier(folder / "guide", ["ordinary person", "wizard", "pirate"])
    tiny_pipeline(folder / "pipeline")
    return {
        "backbone": tl.StableDiffusion(str(folder / "pipeline")),
        "pretrained": str(folder / "pipeline"),
        "classes": ["wizard"],
        "objective": tl.SymmetryLoss(),
        "classifier": str(guide),
        "attributes": {"look": ["wizard", "pirate"]},
        "templates": ["a photo of a {}"],
        "prompts": ["a man"],
        "source": str(folder),
        "column": "look",
        "images": None,
        "concept": "glasses",
        "edits": ["glasses"],
        "scales": [7.5, 1.0],
        "folder": str(folder),
        "number": 2,
        "name": "variant",
        "add": ConceptSettings(),
        "columns": {"style": "a"},
        "words": {"smile": "smiling"},
        "label": "smile",
        "prompt": "a man",
        "judge": str(guide),
        "reference": str(folder),
    }


NEEDS_MORE = ("DoodlCase", "AestheticLoss", "CLIPTextLoss", "CLIPImageLoss", "RecordedGuidance", "SemanticGuidance")
"""Names of classes that take tensors or large models."""
CONSTRUCTED = [
    cls
    for cls in GROUPS
    if cls not in (ModelCheckpoint, tl.StableDiffusionXL, tl.DeepFloydIF, SegaEvaluation, DoodlEvaluation)
    and cls.__name__ not in NEEDS_MORE
]


def tried_values() -> list[tuple[type, str, Any]]:
    """A negative number for each setting that takes numbers, and an empty value for each that can be empty."""
    tried: list[tuple[type, str, Any]] = []
    for cls in CONSTRUCTED:
        for name, parameter in constructor_settings(cls).items():
            kinds = members(parameter.annotation)
            if int in kinds or float in kinds:
                tried.append((cls, name, -1 if int in kinds else -1.0))
            for kind in kinds:
                origin = getattr(kind, "__origin__", kind)
                if origin in (str, list, dict):
                    tried.append((cls, name, origin()))
    return tried


VALUES = tried_values()
VALUE_NAMES = [f"{cls.__name__}-{name}-{value!r}" for cls, name, value in VALUES]


@pytest.mark.parametrize(("cls", "name", "value"), VALUES, ids=VALUE_NAMES)
def test_negative_numbers_and_empty_values(
    cls: type, name: str, value: Any, parts: Mapping[str, Any], count_sweep: Callable
):
    settings = constructor_settings(cls)
    arguments = {key: parts[key] for key, found in settings.items() if found.default is inspect.Parameter.empty}
    if cls is tl.GeneratedDataModule:
        arguments["batches_per_epoch"] = 1
    fault = None
    try:
        cls(**arguments | {name: value})
    except UserError as error:
        line = str(error)
        fault = None if "\n" not in line and len(line) < LONGEST else f"a line of {len(line)}: {line}"
    except Exception as error:  # what is tested for
        fault = f"{type(error).__name__}: {error}"
    else:
        if isinstance(value, int | float) and name not in MAY_BE_NEGATIVE:
            fault = "loaded"
    count_sweep("settings: negative numbers, empty values", 1, {} if fault is None else {name: fault})
    assert fault is None
