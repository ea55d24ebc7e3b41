"""The package as others install and import it."""

import ast
import fnmatch
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tokenlearn
from tokenlearn import paths
from tokenlearn.errors import UserError

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tokenlearn"
HEAVY = ("torch", "lightning", "diffusers", "transformers", "datasets", "timm", "matplotlib", "jsonargparse")


def loaded_by(code: str) -> set[str]:
    """Which heavy libraries are loaded after a piece of code, in a process of its own."""
    code += f"\nimport sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import tokenlearn",
        *(f"from tokenlearn.main import main; main({args})" for args in ([], ["-h"], ["--version"])),
    ],
)
def test_import_and_help_load_nothing_heavy(code):
    assert loaded_by(code) == set()


def test_export_loads_neither_trainer_nor_models():
    code = "from tokenlearn.main import main\ntry: main(['export'])\nexcept SystemExit: pass"
    assert loaded_by(code) == {"torch", "jsonargparse"}


def test_every_public_name_exists():
    for name in tokenlearn.__all__:
        assert getattr(tokenlearn, name).__name__ == name
    assert set(tokenlearn.__all__) <= set(dir(tokenlearn))
    with pytest.raises(AttributeError, match="nonsense"):
        tokenlearn.nonsense  # noqa: B018


def test_type_checkers_see_the_names_that_exist():
    (block,) = (node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"tokenlearn.{module}" for name, module in tokenlearn._MODULES.items()}


def test_no_file_of_the_package_looks_like_a_test():
    for path in PACKAGE.rglob("*.py"):
        assert not fnmatch.fnmatch(path.name, "*_test.py"), path
        assert not fnmatch.fnmatch(path.name, "test_*.py"), path
    collected = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", str(PACKAGE)]
    result = subprocess.run(collected, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, result.stdout


def test_bundled_files_are_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert paths.resolve("checkpoints/portraits") == str(ROOT / "checkpoints" / "portraits")
    assert paths.resolve_config("quickstart") == ROOT / "configs" / "quickstart.yaml"
    assert paths.resolve_config("portraits/sega") == paths.resolve_config("configs/portraits/sega.yaml")
    for name in ("owner/model", "checkpoints/none", "tests/test_package.py", str(tmp_path / "none")):
        assert paths.resolve(name) == name
    with pytest.raises(UserError, match=r"quickstrat.*quickstart"):
        paths.resolve_config("quickstrat")


def test_local_files_come_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").touch()
    assert paths.resolve_config("quickstart") == Path("configs/quickstart.yaml")
    (tmp_path / "quickstart").touch()
    assert paths.resolve_config("quickstart") == Path("quickstart")


def test_bundled_files_of_a_wheel(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "_PACKAGE", tmp_path / "site" / "tokenlearn")
    folder = tmp_path / "site" / "tokenlearn" / "bundled" / "checkpoints" / "portraits"
    folder.mkdir(parents=True)
    assert paths.resolve("checkpoints/portraits") == str(folder)


def test_the_wheel_has_configs_and_checkpoints():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*wheel["sources"], "tokenlearn"} == set(wheel["only-include"])
    assert wheel["sources"] == {name: f"tokenlearn/bundled/{name}" for name in ("configs", "checkpoints")}
