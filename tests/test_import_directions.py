"""Who may import whom: maths depends on torch alone, models and tokens know no trainer, tasks no evaluation."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tokenlearn").rglob("*.py"))

MATHS = ("diffusion", "guidance", "losses")
WITHOUT_TRAINER = (*MATHS, "models", "tokens", "objectives", "pipeline", "editing", "latent_optimiser")
TASKS = ("training", "generation")
FACES = ("__init__", "main", "__main__", "cli", "learning")
"""The command line and the Python API: they alone know everything."""
ABOVE_TASKS = ("evaluation", "callbacks")
PAGE = "page"
"""What the command line alone opens, and the one package that imports Gradio."""
LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")


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


def within_own(module: str, *parts: str) -> bool:
    return within(module, *(f"tokenlearn.{part}" for part in parts))


def forbidden(path: tuple[str, ...], module: str) -> bool:
    """Whether the file of a dotted path such as ``("tokenlearn", "losses", "mse")`` must not import ``module``."""
    part = path[1] if len(path) > 1 else ""
    if part in FACES and len(path) == 2:
        return False
    if within_own(module, "main", "cli", "learning"):
        return True
    if part != PAGE and (within_own(module, PAGE) or within(module, "gradio")):
        return True
    if part == PAGE and within(module, *LIGHTNING):
        return True
    if part in MATHS:
        stdlib = module.split(".")[0] in sys.stdlib_module_names
        return not (stdlib or within(module, "torch") or within_own(module, "errors", *MATHS))
    if part in WITHOUT_TRAINER and within(module, *LIGHTNING):
        return True
    if part in TASKS and within_own(module, *(task for task in TASKS if task != part)):
        return True
    if part not in (*TASKS, *ABOVE_TASKS) and within_own(module, *TASKS):
        return True
    return part not in ABOVE_TASKS and within_own(module, *ABOVE_TASKS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports(file: Path):
    path = file.relative_to(ROOT).with_suffix("").parts
    wrong = [module for module in imported_modules(file.read_text(), path[:-1]) if forbidden(path, module)]
    assert not wrong, f"{file.relative_to(ROOT)} must not import {', '.join(wrong)}"


@pytest.mark.parametrize(
    ("file", "source", "allowed"),
    [
        ("tokenlearn/losses/a.py", "import torch.nn.functional as F, math", True),
        ("tokenlearn/losses/a.py", "from tokenlearn.diffusion.process import Process", True),
        ("tokenlearn/losses/a.py", "from ..errors import UserError", True),
        ("tokenlearn/losses/a.py", "import torchvision", False),
        ("tokenlearn/losses/a.py", "from .. import models", False),
        ("tokenlearn/guidance/a.py", "def f():\n    import numpy", False),
        ("tokenlearn/diffusion/a.py", "from tokenlearn.models import StableDiffusion", False),
        ("tokenlearn/diffusion/solvers/a.py", "from tokenlearn.guidance.base import GuidanceRule", True),
        ("tokenlearn/diffusion/solvers/a.py", "import diffusers", False),
        ("tokenlearn/tokens/a.py", "import transformers", True),
        ("tokenlearn/tokens/a.py", "from lightning.pytorch import Callback", False),
        ("tokenlearn/models/backbones/a.py", "import pytorch_lightning", False),
        ("tokenlearn/models/a.py", "from tokenlearn.training import ClassTokens", False),
        ("tokenlearn/objectives/a.py", "from lightning_fabric import seed", False),
        ("tokenlearn/objectives/a.py", "from tokenlearn.models import ClipModel", True),
        ("tokenlearn/pipeline.py", "import lightning as L", False),
        ("tokenlearn/pipeline.py", "from tokenlearn.generation import Edit", False),
        ("tokenlearn/editing.py", "from tokenlearn.pipeline import Pipeline", True),
        ("tokenlearn/latent_optimiser.py", "import lightning", False),
        ("tokenlearn/data/a.py", "import lightning", True),
        ("tokenlearn/data/a.py", "from tokenlearn.training.base import TokenTraining", False),
        ("tokenlearn/token_task.py", "import lightning", True),
        ("tokenlearn/training/a.py", "import lightning", True),
        ("tokenlearn/training/a.py", "from tokenlearn.training.base import TokenTraining", True),
        ("tokenlearn/training/a.py", "from tokenlearn.generation.base import Results", False),
        ("tokenlearn/generation/a.py", "from ..training import base", False),
        ("tokenlearn/generation/a.py", "from tokenlearn.evaluation.table import Table", False),
        ("tokenlearn/training/a.py", "def f():\n    from tokenlearn.evaluation import Table", False),
        ("tokenlearn/training/a.py", "from tokenlearn.callbacks import ImageGrid", False),
        ("tokenlearn/evaluation/a.py", "import tokenlearn.training, tokenlearn.generation", True),
        ("tokenlearn/callbacks/a.py", "from tokenlearn.evaluation.table import Table", True),
        ("tokenlearn/metrics/a.py", "from tokenlearn.evaluation.table import Table", False),
        ("tokenlearn/evaluation/a.py", "from tokenlearn import main", False),
        ("tokenlearn/training/a.py", "from ..main import main", False),
        ("tokenlearn/training/a.py", "from tokenlearn.learning import learn", False),
        ("tokenlearn/page/a.py", "from tokenlearn.editing import ImageEditor", True),
        ("tokenlearn/page/a.py", "import gradio", True),
        ("tokenlearn/page/a.py", "import lightning", False),
        ("tokenlearn/page/a.py", "from tokenlearn.generation import Edit", False),
        ("tokenlearn/pipeline.py", "from tokenlearn.page.studio import Studio", False),
        ("tokenlearn/generation/a.py", "import gradio", False),
        ("tokenlearn/__main__.py", "from tokenlearn.main import main", True),
        ("tokenlearn/__init__.py", "from tokenlearn.evaluation import Table", True),
        ("tokenlearn/data/__init__.py", "from tokenlearn.evaluation import Table", False),
        ("tokenlearn/cli.py", "import lightning, tokenlearn.evaluation, tokenlearn.callbacks, numpy", True),
    ],
)
def test_the_rules_themselves(file: str, source: str, allowed: bool):
    path = Path(file).with_suffix("").parts
    assert allowed != any(forbidden(path, module) for module in imported_modules(source, path[:-1]))


@pytest.mark.parametrize("module", ["pipeline", "editing", "latent_optimiser", "objectives", "export"])
def test_modules_for_notebooks_load_without_the_trainer(module: str):
    """Not even through what they import."""
    check = f"import sys, tokenlearn.{module}; print([name for name in {LIGHTNING} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
