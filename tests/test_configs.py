"""Every shipped config runs as users run it, at reduced size; backbones and methods combine."""

import json
import re
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from PIL import Image

from tests.tiny import tiny_classifier, tiny_pipeline
from tests.tiny_clip import tiny_aesthetic_head, tiny_clip
from tests.tiny_xl import tiny_xl_pipeline
from tokenlearn.main import main
from tokenlearn.tokens import embedding_file_name, save_embedding

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
BACKBONES, METHODS, OWN, PORTRAITS = (
    sorted((CONFIGS / folder).glob("*.yaml")) for folder in ("backbones", "methods", "own", "portraits")
)
CHANGES = sorted((CONFIGS / "changes").glob("*.yaml"))
COMPLETE = [CONFIGS / "quickstart.yaml", *PORTRAITS]
REDUCTIONS = yaml.safe_load((ROOT / "tests" / "config_reductions.yaml").read_text())
TINY = "tiny/"
OWN_CLASSES = ["clown", "nurse", "other"]


def name_of(config):
    return config.relative_to(CONFIGS).with_suffix("").as_posix() if isinstance(config, Path) else config


def with_lists(changes, given):
    """Changes in which slices, such as ``"2:5"``, are replaced by the list with these elements changed."""
    if isinstance(given, list) and isinstance(changes, dict):
        elements = list(given)
        for part, change in changes.items():
            chosen = slice(*(int(bound) if bound else None for bound in part.split(":")))
            elements[chosen] = [merged(element, change) for element in elements[chosen]]
        return elements
    if isinstance(given, dict) and isinstance(changes, dict):
        return {name: with_lists(change, given.get(name)) for name, change in changes.items()}
    return changes


def merged(given, changes):
    """Nested settings with changes."""
    if isinstance(given, dict) and isinstance(changes, dict):
        return given | {name: merged(given.get(name), change) for name, change in changes.items()}
    return changes


def with_files(settings, folder):
    """Settings with the paths of tiny models and data."""
    if isinstance(settings, dict):
        return {name: with_files(value, folder) for name, value in settings.items()}
    if isinstance(settings, list):
        return [with_files(value, folder) for value in settings]
    if isinstance(settings, str) and settings.startswith(TINY):
        return str(folder / settings.removeprefix(TINY))
    return settings


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory):
    """A folder of tiny models of each kind, images of two classes, and embedding files."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline(folder / "sd15")
    tiny_xl_pipeline(folder / "sdxl")
    for name in ("guide", "judge"):
        tiny_classifier(folder / name, ["tiger cat", "bullfrog", "sorrel", "zebra", "otterhound"])
    tiny_clip(folder / "clip")
    tiny_aesthetic_head(folder / "head", "../clip")
    for shade, name in enumerate(("dog", "mug")):
        (folder / "images" / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (40, 30), (100 * shade, 60 * index, 80)).save(folder / "images" / name / f"{index}.png")
    for name in ("guide", "judge"):
        tiny_classifier(folder / "own" / name, OWN_CLASSES)
    for shade, name in enumerate(OWN_CLASSES):
        (folder / "own" / "photos" / name).mkdir(parents=True)
        for index in range(3):
            image = Image.new("RGB", (40, 30), (100 * shade, 60 * index, 80))
            image.save(folder / "own" / "photos" / name / f"{index}.png")
    for token in ("<bullfrog>", "<sorrel>", "<zebra>"):
        path = folder / "embeddings" / embedding_file_name(token)
        save_embedding(path, token, [torch.ones(1, 16)], {})
    return folder


@pytest.fixture
def run(tmp_path, capsys):
    """Run a command with configs and further settings, and return the run folder."""

    def run_command(command, configs, settings, *options):
        overriding, folder = tmp_path / "reduced.yaml", tmp_path / "run"
        overriding.write_text(yaml.safe_dump(settings))
        files = [argument for config in (*configs, overriding) for argument in ("--config", str(config))]
        capsys.readouterr()
        main([command, *files, "--output_dir", str(folder), "--trainer.enable_progress_bar=false", *options])
        assert capsys.readouterr().out.strip().splitlines()[-1] == str(folder)
        return folder

    return run_command


def run_reduced(run, config, *, others=(), settings=None, tiny_folder=ROOT):
    """Run a config as its reduction says, and check the files and figures that it must leave."""
    reduction = REDUCTIONS[name_of(config)]
    changes = with_lists(reduction["settings"], yaml.safe_load(config.read_text()))
    changes = merged(with_files(changes, tiny_folder), settings or {})
    folder = run(reduction["command"], [*others, config], changes)
    if "then" in reduction:
        (best,) = folder.glob("checkpoints/best-*.ckpt")
        run(reduction["then"], [*others, config], changes, "--ckpt_path", str(best))
    for pattern, number in reduction["files"].items():
        assert len(list(folder.glob(pattern))) == number, pattern
    if "summary" in reduction:
        assert set(reduction["summary"]) <= json.loads((folder / "summary.json").read_text()).keys()


def test_every_config_that_can_run_has_a_reduction():
    assert set(REDUCTIONS) == {name_of(config) for config in (*COMPLETE, *METHODS, *OWN, *CHANGES)}


@pytest.mark.parametrize("config", COMPLETE, ids=name_of)
def test_complete_configs_run(config, run):
    run_reduced(run, config)


@pytest.mark.parametrize(
    ("config", "backbone"),
    [*((config, "sd15") for config in (*METHODS, *OWN)), (CONFIGS / "methods" / "class_token.yaml", "sdxl")],
    ids=name_of,
)
def test_methods_run_on_backbones(config, backbone, run, tiny_files):
    model = {"backbone": {"init_args": {"pretrained": str(tiny_files / backbone), "variant": None}}}
    run_reduced(
        run,
        config,
        others=[CONFIGS / "backbones" / f"{backbone}.yaml"],
        settings={"model": {"init_args": model}},
        tiny_folder=tiny_files,
    )


@pytest.mark.parametrize("config", CHANGES, ids=name_of)
def test_changes_run_after_the_config_that_they_change(config, run):
    changed = re.search(r"--config (\S+) --config changes/", config.read_text())[1]
    run_reduced(run, config, others=[CONFIGS / f"{changed}.yaml"])


@pytest.mark.parametrize("config", sorted(CONFIGS.rglob("*.yaml")), ids=name_of)
def test_configs_are_short(config):
    lines = config.read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 119


@pytest.mark.parametrize("config", BACKBONES, ids=name_of)
def test_backbone_configs_set_the_backbone_alone(config):
    settings = yaml.safe_load(config.read_text())
    assert list(settings) == ["model"]
    assert list(settings["model"]) == ["init_args"]
    assert list(settings["model"]["init_args"]) == ["backbone"]


@pytest.mark.parametrize("config", [*METHODS, *OWN], ids=name_of)
def test_method_configs_leave_the_backbone_out(config):
    assert "backbone" not in yaml.safe_load(config.read_text())["model"]["init_args"]


def resolved(configs, capsys):
    """The settings that a run with these configs would use."""
    capsys.readouterr()
    files = [argument for config in configs for argument in ("--config", str(config))]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *files, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


PAIRS = [
    (METHODS[index % len(METHODS)], BACKBONES[index % len(BACKBONES)])
    for index in range(max(len(METHODS), len(BACKBONES)))
]


@pytest.mark.parametrize(("method", "backbone"), PAIRS, ids=name_of)
def test_methods_and_backbones_combine_in_any_order(method, backbone, capsys):
    """Models of these sizes are not loaded here, so their settings are checked only."""
    settings = resolved([backbone, method], capsys)
    assert resolved([method, backbone], capsys) == settings
    model, given = settings["model"], yaml.safe_load(method.read_text())["model"]
    assert model["class_path"].rpartition(".")[2] == given["class_path"]
    expected = yaml.safe_load(backbone.read_text())["model"]["init_args"]["backbone"]
    found = model["init_args"]["backbone"]
    assert found["class_path"].rpartition(".")[2] == expected["class_path"]
    assert expected["init_args"].items() <= found["init_args"].items()
