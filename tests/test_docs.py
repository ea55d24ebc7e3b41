"""README, docs and notebook say what happens: their Python runs, their settings parse, their links lead somewhere."""

import json
import re
import shlex
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import tokenlearn as tl
from tests.diffusion.networks import PROCESS, conditioning, gaussian, guided
from tokenlearn.diffusion import GridSolver, invert, sample
from tokenlearn.main import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
NOTEBOOK = DOCS / "notebook.ipynb"
TEN_LINES = ("class_tokens.md", "caso.md", "sega.md", "doodl.md")
"""Pages whose first Python block is a whole script."""

REDUCTIONS = {
    "max_steps=60": "max_steps=1",
    "max_steps=80": "max_steps=1",
    "max_steps=40": "max_steps=1",
    "max_steps: 40": "max_steps: 1",
    "steps=60": "steps=1",
    '"steps": 40': '"steps": 1',
    "optimisation: {steps: 30}": "optimisation: {steps: 1}",
    "seeds=range(8)": "seeds=range(1)",
    "seeds=range(4)": "seeds=range(1)",
    "seeds=[1, 2, 3, 4]": "seeds=[1]",
    "for strength in (0, 1, 2, 4)": "for strength in (0, 4)",
    "portraits:2000": "portraits:200",
    "portraits_dataset(2000": "portraits_dataset(200",
}
"""What the tests replace in code and settings before they run them, to be quick. Everything else runs as it stands."""

DEFAULTS = {
    tl.Sampling: {"steps": 12},
    tl.PromptDataModule: {"batch_size": 1, "test_images": 1, "eval_batch_size": 2},
}
"""Defaults that are smaller in the tests, to be quick."""


class Block(NamedTuple):
    """A fenced block: the page, the line before its first one, its language and text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line + 1}"


def blocks_of(page):
    text = page.read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        yield Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
YAML = [block for block in BLOCKS if block.language == "yaml"]


def reduced(text):
    for old, new in REDUCTIONS.items():
        text = text.replace(old, new)
    return text


def module_of(block):
    """Name of the file that a Python block is, by its first line; None for a script."""
    found = re.match(r"# (\w+\.py)\n", block.text)
    return found and found[1]


def words_of(line):
    """Arguments of ``tokenlearn`` in a command line; None if it is another command."""
    words = shlex.split(line, comments=True)
    return words[words.index("tokenlearn") + 1 :] if "tokenlearn" in words else None


def commands():
    """Every ``tokenlearn`` command of the pages' console blocks, to a place where it stands."""
    found = {}
    for block in BLOCKS:
        if block.language == "console":
            for line in re.split(r"\n|&&", block.text):
                words = None if line.startswith("git") else words_of(line)
                if words:
                    found.setdefault(tuple(words), str(block))
    return found


def run_script(blocks, namespace):
    """Execute Python blocks in one namespace; tracebacks name page and line."""
    for block in blocks:
        code = compile("\n" * block.line + reduced(block.text), str(block.page.relative_to(ROOT)), "exec")
        exec(code, namespace)


@pytest.fixture(scope="module")
def data_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, data_cache):
    """An empty working directory: bundled files are found through the package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(data_cache))
    return tmp_path


@pytest.fixture
def smaller_defaults(monkeypatch):
    for cls, smaller in DEFAULTS.items():
        names = cls.__init__.__code__.co_varnames[1 : cls.__init__.__code__.co_argcount]
        defaults = cls.__init__.__defaults__
        changed = dict(zip(names[-len(defaults) :], defaults, strict=True)) | smaller
        assert len(changed) == len(defaults)
        monkeypatch.setattr(cls.__init__, "__defaults__", tuple(changed.values()))


def scripts():
    by_page = defaultdict(list)
    for block in BLOCKS:
        if block.language == "python" and not module_of(block):
            by_page[block.page].append(block)
    return by_page


SCRIPTS = scripts()


@pytest.mark.parametrize("page", SCRIPTS, ids=lambda page: page.name)
@pytest.mark.usefixtures("smaller_defaults")
def test_python_runs(page, folder):
    if page.name == "embedding_files.md":  # its last script is for diffusers alone, which looks nowhere else
        (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    namespace = {}
    run_script(SCRIPTS[page], namespace)
    if page.name == "embedding_files.md":
        assert_equals_diffusers(folder / "pirate.png")


def assert_equals_diffusers(path):
    pipe = tl.Pipeline.from_pretrained(
        "checkpoints/portraits", tokens="checkpoints/class_tokens/pirate-tl.safetensors"
    )
    (ours,) = pipe("a portrait of a <pirate> pirate", seeds=[7], steps=20, guidance=7.5)
    difference = np.asarray(ours, dtype=int) - np.asarray(Image.open(path), dtype=int)
    assert np.abs(difference).max() <= 1  # rounding to 8 bits may fall to either side


@pytest.mark.parametrize("page", TEN_LINES)
def test_each_method_takes_ten_lines_and_one_import(page):
    lines = [line for line in SCRIPTS[DOCS / page][0].text.splitlines() if line.strip()]
    assert len(lines) <= 10
    assert [line for line in lines if "import" in line] == ["import tokenlearn as tl"]


@pytest.mark.usefixtures("smaller_defaults")
def test_notebook_runs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    namespace = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile(reduced("".join(cell["source"])), f"notebook cell {number}", "exec"), namespace)


def test_reductions_are_used():
    text = "".join(path.read_text() for path in [*PAGES, NOTEBOOK])
    assert [old for old in REDUCTIONS if old not in text] == []


def command_of(block):
    """The command in the comment of a YAML block's first line; the block is the file that it names last."""
    return words_of(block.text.splitlines()[0].removeprefix("# "))


def given_by(block, folder):
    """Command and options for a YAML block, with the block written to its file."""
    command, *options = command_of(block)
    (folder / options[-1]).write_text(reduced(block.text))
    return command, options


def parsed(arguments, capsys):
    """The settings that a command would use, without running it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--print_config"])
    assert stopped.value.code == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("block", [block for block in YAML if block.page.name != "extending.md"], ids=str)
def test_settings_parse(block, folder, capsys):
    command, options = given_by(block, folder)
    parsed([command, *options], capsys)


# The config of doodl_test is long, and tests/test_configs.py runs it.
@pytest.mark.parametrize("words", [words for words in commands() if "portraits/doodl_test" not in words], ids=" ".join)
def test_commands_parse(words, capsys):
    parsed(words, capsys)


@pytest.mark.parametrize("block", [block for block in YAML if block.page.name == "extending.md"], ids=str)
def test_extensions_run(block, folder):
    modules = {module_of(module): module for module in BLOCKS if module.language == "python" and module_of(module)}
    command, options = given_by(block, folder)
    name = Path(options[-1]).with_suffix(".py").name
    (folder / name).write_text(modules[name].text)
    main([command, *options, "--output_dir", "run", "--trainer.enable_progress_bar=false"])
    results = {"predict": "images/**/*.png", "fit": "embeddings/*.safetensors"}
    assert list(folder.glob(f"run/{results[command]}"))


def example(name):
    """The namespace of an example file of the page on extending."""
    (block,) = (block for block in BLOCKS if module_of(block) == name)
    namespace = {}
    run_script([block], namespace)
    return namespace


def test_projected_guidance_is_classifier_free_guidance_at_eta_1():
    unconditional, conditional = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    rule = example("apg.py")["ProjectedGuidance"](5.0, eta=1.0)
    expected = unconditional + 5 * (conditional - unconditional)
    torch.testing.assert_close(rule([unconditional, conditional], 0), expected)


def test_bdia_steps_as_published_and_comes_back():
    gamma = 0.9
    solver = GridSolver(example("bdia.py")["BDIA"](gamma), PROCESS, 10, dtype=torch.float64)
    model = guided(gaussian, [conditioning(0.3)])
    first = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = solver.grid().levels

    def ddim(latents, at, to):
        noise = model(latents, torch.tensor(at.timestep), 0)
        return to.alpha / at.alpha * (latents - at.sigma * noise) + to.sigma * noise

    with torch.no_grad():
        path = [first, ddim(first, *levels[:2])]
        for before, at, after in zip(levels, levels[1:], levels[2:], strict=False):
            forward, back = ddim(path[-1], at, after), ddim(path[-1], at, before)
            path.append(gamma * path[-2] - gamma * back + forward)
        sampled = sample(model, first, solver=solver)
        torch.testing.assert_close(sampled, path[-1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sample(model, invert(model, sampled, solver=solver), solver=solver), sampled)


def test_every_extension_has_settings():
    modules = [module_of(block) for block in BLOCKS if block.language == "python" and module_of(block)]
    files = [command_of(block)[-1] for block in YAML if block.page.name == "extending.md"]
    assert [name.removesuffix(".py") for name in modules] == [name.removesuffix(".yaml") for name in files]
    assert len(modules) == 5


def test_readme_is_short_and_shows_the_commands():
    assert len(README.read_text().split()) <= 1200
    shown = "".join(block.text for block in blocks_of(README) if block.language == "console")
    for command in ("git clone", "pip install uv && uv run tokenlearn fit --config configs/quickstart.yaml"):
        assert command in shown
    assert "uv run pytest" in shown


def anchors_of(page):
    """Names of a page's headings, as links on the web name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [
        *PAGES,
        *(ROOT / name for name in ("CHANGELOG.md", "benchmarks/README.md")),
        *ROOT.glob("checkpoints/*/README.md"),
    ],
    ids=str,
)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors_of(linked), target
    for path in re.findall(r"(?:configs|tests|benchmarks|tokenlearn|data_prep)/[\w/]+\.(?:yaml|py|png)", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m (data_prep\.\w+)", text):
        assert find_spec(module), module
