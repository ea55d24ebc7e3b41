"""Wrong settings give one line that names the setting, the value, what was expected and the nearest right name."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import pytest

from tests.command_line import error_of
from tokenlearn.configs import Typed, given_settings
from tokenlearn.errors import UserError
from tokenlearn.setting_checks import Section, check_settings
from tokenlearn.setting_types import accepts, constructor_settings, describe


@dataclass(frozen=True)
class Steps:
    steps: int = 50
    scale: float | None = 1.0


class Rule:
    pass


class Strong(Rule):
    def __init__(self, power: float = 2.0) -> None:
        pass


class Optimiser:
    def __init__(self, weights: Iterable[float], rate: float = 0.1) -> None:
        pass


def default_optimiser(weights: Iterable[float]) -> Optimiser:
    return Optimiser(weights)


class Task:
    pass


class Learn(Task):
    def __init__(
        self,
        classes: dict[str, str | None] | list[str],
        rule: Rule | float = 1.0,
        rules: list[Rule] = [],  # noqa: B006 - as in the package
        sampling: Steps = Steps(),
        kind: Literal["words", "ridge"] = "words",
        optimiser: Callable[[Iterable], Optimiser] = default_optimiser,
        name: str | None = None,
    ) -> None:
        pass


class Data:
    pass


class Prompts(Data):
    def __init__(self, prompts: list[str], size: tuple[int, int] | None = None) -> None:
        pass


SECTIONS = {
    "model": Section(Task, named=True),
    "data": Section(Data, named=True),
    "steps": Section(Steps, named=False),
}


STRONG = {"class_path": "Strong"}


def check(**init_args):
    """Check the settings of the task ``Learn``."""
    model = {"class_path": "Learn", "init_args": {"classes": ["a"]} | init_args}
    check_settings({"model": model, "data": {"class_path": "Prompts", "init_args": {"prompts": []}}}, SECTIONS)


@pytest.mark.parametrize(
    "settings",
    [
        {"classes": {"a": None, "b": "words"}},
        {"rule": 2},
        {"rule": "Strong"},
        {"rule": {"class_path": "Strong", "init_args": {"power": "1e-3"}}},
        {"rule": {"class_path": f"{__name__}.Strong"}},
        {"rules": [{"class_path": "Strong"}, "Rule"]},
        {"sampling": {"steps": 3, "scale": None}},
        {"optimiser": {"class_path": "Optimiser", "init_args": {"rate": 1}}},
        {"name": None},
        {"name": Typed("5")},
        {"sampling": Typed("{steps: 5}")},
        {"classes": Typed("[a, b]")},
        {"kind": Typed("ridge")},
    ],
)
def test_right_settings_pass(settings):
    check(**settings)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"sampling": 20}, "model.sampling must be settings of Steps (steps, scale), got 20"),
        ({"sampling": None}, "model.sampling must be settings of Steps (steps, scale), got null"),
        ({"sampling": {"steps": "x"}}, "model.sampling.steps must be a whole number, got 'x'"),
        ({"sampling": {"steps": Typed("x")}}, "model.sampling.steps must be a whole number, got 'x'"),
        ({"sampling": {"steps": Typed("null")}}, "model.sampling.steps must be a whole number, got null"),
        ({"sampling": {"scale": []}}, "model.sampling.scale must be a number or null, got []"),
        ({"sampling": {"stpes": 3}}, "model.sampling (Steps) has no setting 'stpes', got 3; did you mean 'steps'?"),
        ({"prompts": ["x"]}, "model (Learn) has no setting 'prompts', got ['x']; it is in data: data.prompts"),
        ({"scale": 2}, "model (Learn) has no setting 'scale', got 2; it is model.sampling.scale"),
        ({"promts": 2}, "model (Learn) has no setting 'promts', got 2; did you mean data.prompts?"),
        ({"rule": "Strogn"}, "must be a class of Rule (Strong) or a number, got 'Strogn'; did you mean Strong?"),
        ({"rule": STRONG | {"init_args": {"powr": 1}}}, "has no setting 'powr', got 1; did you mean 'power'?"),
        ({"rule": {"class_path": "Strong", "power": 1}}, "below init_args: model.rule.init_args.power"),
        ({"rule": {"class_path": "no.such.Rule"}}, "names the class 'no.such.Rule', which cannot be imported"),
        ({"rule": {"class_path": "pathlib.Path"}}, "model.rule must be a class of Rule (Strong) or a number"),
        ({"rules": "Strong"}, "model.rules must be a list of a class of Rule (Strong), got 'Strong'"),
        ({"rules": [{"class_path": "Strong", "init_args": {"power": "x"}}]}, "model.rules[0].power must be a number"),
        ({"classes": 5}, "model.classes must be a mapping of texts to text or null or a list of texts, got 5"),
        ({"classes": {True: None}}, "model.classes has the name true; expected text; YAML reads yes, no"),
        ({"classes": [1]}, "model.classes[0] must be text, got 1; put it in quotes"),
        ({"kind": "rigde"}, "model.kind must be one of 'words', 'ridge', got 'rigde'; did you mean 'ridge'?"),
        ({"name": False}, "model.name must be text or null, got false; YAML reads yes, no, on and off"),
        ({"optimiser": None}, "model.optimiser must be a class of Optimiser, got null"),
        ({"optimiser": {"rate": 1}}, "model.optimiser has settings but no class; name it too"),
        ({"optimiser": {"class_path": "Optimiser", "init_args": {"weights": 1}}}, "has no setting 'weights'"),
    ],
)  # fmt: skip
def test_wrong_settings_give_one_line(settings, line):
    with pytest.raises(UserError) as caught:
        check(**settings)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"modle": {}}, "there is no section or setting 'modle'; did you mean 'model'?"),
        ({"model": {"class_path": "Learn"}}, "model.classes is missing, which Learn needs; it must be a mapping"),
        ({"model": {"class_path": None}}, "got the class_path null"),
        ({"model": 5}, "model must be a class of Task (Learn), got 5"),
        (
            {"model": {"class_path": "Learn", "init_args": [1]}},
            "init_args must be a mapping of settings, got [1]",
        ),
        ({"steps": 5}, "steps must be settings of Steps, got 5"),
        ({"steps": {"scael": 5}}, "steps (Steps) has no setting 'scael', got 5; did you mean 'scale'?"),
        ({"optimiser": 1, "model": "Learn"}, "model.classes is missing"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'"),
    ],
)
def test_wrong_sections_give_one_line(given, line):
    with pytest.raises(UserError) as caught:
        check_settings(dict(reversed(given.items())), SECTIONS, {"seed": int})
    assert line in str(caught.value)


def test_options_and_files_become_one_tree(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "model: {class_path: Learn, init_args: {kind: words, rule: {class_path: Strong}}}"
    )
    (tmp_path / "b.yaml").write_text("model: {init_args: {kind: ridge}}")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    options = [
        "--model.rule.power=3",
        "--model.init_args.sampling.steps",
        "4",
        "--model.name",
        "x",
        "--steps.scale=-1",
    ]
    assert given_settings([*files, *options]) == {
        "model": {
            "class_path": "Learn",
            "init_args": {
                "rule": {"class_path": "Strong", "init_args": {"power": Typed("3")}},
                "kind": "ridge",
                "sampling": {"steps": Typed("4")},
                "name": Typed("x"),
            },
        },
        "steps": {"scale": Typed("-1")},
    }


def test_another_class_drops_the_settings_of_the_first(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {class_path: Learn, init_args: {kind: words}}")
    (tmp_path / "b.yaml").write_text("model: {class_path: Task}")
    given = given_settings(["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")])
    assert given == {"model": {"class_path": "Task"}}


def test_constructor_settings_follow_the_base_class():
    class More(Strong):
        def __init__(self, extra: int = 0, **kwargs: float) -> None:
            super().__init__(**kwargs)

    class Open:
        def __init__(self, **kwargs: float) -> None:
            pass

    assert list(constructor_settings(More)) == ["extra", "power"]
    assert constructor_settings(Open) is None
    assert list(constructor_settings(default_optimiser)) == ["weights"]


@pytest.mark.parametrize(
    ("hint", "value", "accepted"),
    [(int, 3, True), (int, "3", True), (int, 3.5, False), (int, None, False), (int | None, None, True),
     (float, "1e-3", True), (bool, "yes", True), (bool, 2, False), (str, 5, False), (Literal["a"], "b", False)],
)  # fmt: skip
def test_accepts(hint, value, accepted):
    assert accepts(hint, value) == accepted


def test_describe():
    assert describe(int | None) == "a whole number or null"
    assert describe(dict[str, list[float]]) == "a mapping of texts to a list of numbers"
    assert describe(tuple[int, int]) == "a list of 2 values (a whole number, a whole number)"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.promt", "x"], ["model (ClassTokens) has no setting 'promt'"]),
        (["--optimizer.lr", "1"], ["it is in model: model.optimizer"]),
        (["--trainer.max_step", "1"], ["did you mean 'max_steps'?"]),
        (["--model", "ClasTokens"], ["did you mean ClassTokens?"]),
        (["--data.templates+={a: 1}"], ["data.templates+ must be text, got {'a': 1}; put it in quotes"]),
        (["--data.templates+=photo: {}"], ["data.templates+ must be text", "'\"photo: {}\"'"]),
        (["--model.classes+={a: 1}"], ["model.classes+ must be text, got {'a': 1}"]),
        (["--trainer.callbacks+={a: 1}"], ["has no setting 'a', got 1; it has no settings"]),
        (["--trainer.devices={a: 1}"], ["setting below trainer is not possible", "(got devices: '{a: 1}')"]),
        (["--model.tokens.initial_embeddings={a: 3}"], ["model.tokens.initial_embeddings.a must be text, got 3"]),
        (["--data=null"], ["ClassTokens needs data for 'fit'"]),
        (["--output_dir="], ["output_dir is empty; name a folder"]),
        (["--output_dir", " "], ["output_dir is empty"]),
        (["--seed_everything", "x"], ["seed_everything must be true or false or a whole number, got 'x'"]),
    ],
)
def test_options_of_the_command_line(tiny_config, capsys, options, words):
    error = error_of(["fit", "--config", tiny_config(), *options], capsys)
    assert all(word in error for word in words)
    assert len(error) < 260


def test_a_run_without_settings(tmp_path, capsys):
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "word.yaml").write_text("hello")
    assert "is empty" in error_of(["fit", "--config", str(tmp_path / "empty.yaml")], capsys)
    assert "has no sections, but 'hello'" in error_of(["fit", "--config", str(tmp_path / "word.yaml")], capsys)
    assert "fit has no model" in error_of(["fit", "--trainer.max_steps=1"], capsys)
