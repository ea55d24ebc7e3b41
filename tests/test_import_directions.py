"""Who may import whom: maths depends on torch alone, frozen models and tokens do not know the trainer."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MATHS = ("diffusion", "guidance", "losses")
FILES = sorted((ROOT / "tokenlearn").rglob("*.py"))


def imported_modules(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Absolute names of everything a source file imports, anywhere in it; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def forbidden(path: tuple[str, ...], module: str) -> bool:
    """Whether the file of a dotted path such as ``("tokenlearn", "losses", "mse")`` must not import ``module``."""
    part = path[1] if len(path) > 1 else ""
    if within(module, "tokenlearn.main") and part not in ("main", "__main__"):
        return True
    if part in MATHS:
        own = ("tokenlearn.errors", *(f"tokenlearn.{name}" for name in MATHS))
        return not (module.split(".")[0] in sys.stdlib_module_names or within(module, "torch", *own))
    if part in ("tokens", "models"):
        return within(module, "lightning", "lightning_fabric", "pytorch_lightning")
    return False


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports(file: Path):
    path = file.relative_to(ROOT).with_suffix("").parts
    wrong = [module for module in imported_modules(file.read_text(), path[:-1]) if forbidden(path, module)]
    assert not wrong, f"{file.relative_to(ROOT)} must not import {', '.join(wrong)}"


@pytest.mark.parametrize(
    ("file", "source", "allowed"),
    [
        ("tokenlearn/losses/a.py", "import torch.nn.functional as F, math", True),
        ("tokenlearn/losses/a.py", "from tokenlearn.diffusion.schedule import add_noise", True),
        ("tokenlearn/losses/a.py", "from ..errors import UserError", True),
        ("tokenlearn/losses/a.py", "import torchvision", False),
        ("tokenlearn/losses/a.py", "from .. import models", False),
        ("tokenlearn/guidance/a.py", "def f():\n    import numpy", False),
        ("tokenlearn/diffusion/a.py", "from tokenlearn.models import StableDiffusion", False),
        ("tokenlearn/tokens/a.py", "import transformers", True),
        ("tokenlearn/tokens/a.py", "from lightning.pytorch import Callback", False),
        ("tokenlearn/models/a.py", "import pytorch_lightning", False),
        ("tokenlearn/methods/a.py", "import lightning", True),
        ("tokenlearn/methods/a.py", "from tokenlearn import main", False),
        ("tokenlearn/methods/a.py", "from ..main import main", False),
        ("tokenlearn/__main__.py", "from tokenlearn.main import main", True),
        ("tokenlearn/main.py", "import lightning, tokenlearn.methods, numpy", True),
    ],
)
def test_the_rules_themselves(file: str, source: str, allowed: bool):
    path = Path(file).with_suffix("").parts
    assert allowed != any(forbidden(path, module) for module in imported_modules(source, path[:-1]))
