"""Every shipped config runs as users run it, at reduced size; backbones and methods combine."""

import copy
import json
from pathlib import Path

import datasets
import pytest
import yaml

from tests.tiny import tiny_classifier, tiny_pipeline
from tests.tiny_xl import tiny_xl_pipeline
from tokenlearn.main import main

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
BACKBONES, METHODS, PORTRAITS = (
    sorted((CONFIGS / folder).glob("*.yaml")) for folder in ("backbones", "methods", "portraits")
)
COMPLETE = [CONFIGS / "quickstart.yaml", *PORTRAITS]
REDUCTIONS = yaml.safe_load((ROOT / "tests" / "config_reductions.yaml").read_text())


def name_of(config):
    return config.relative_to(CONFIGS).with_suffix("").as_posix()


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


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


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


def resolved(configs, capsys):
    """The settings that a run with these configs would use."""
    capsys.readouterr()
    files = [argument for config in configs for argument in ("--config", str(config))]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *files, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_every_complete_config_has_a_reduction():
    assert set(REDUCTIONS) == {name_of(config) for config in COMPLETE}


@pytest.mark.parametrize("config", COMPLETE, ids=name_of)
def test_complete_configs_run(config, run):
    reduction = REDUCTIONS[name_of(config)]
    settings = with_lists(reduction["settings"], yaml.safe_load(config.read_text()))
    folder = run(reduction["command"], [config], settings)
    if "then" in reduction:
        (best,) = folder.glob("checkpoints/best-*.ckpt")
        run(reduction["then"], [config], settings, "--ckpt_path", str(best))
    for pattern, number in reduction["files"].items():
        assert len(list(folder.glob(pattern))) == number, pattern
    if "summary" in reduction:
        assert set(reduction["summary"]) <= json.loads((folder / "summary.json").read_text()).keys()


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


@pytest.mark.parametrize("config", METHODS, ids=name_of)
def test_method_configs_leave_the_backbone_out(config):
    assert "backbone" not in yaml.safe_load(config.read_text())["model"]["init_args"]


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


def few_steps(pretrained, folder):
    """Settings of a short fit of class tokens by a tiny model."""
    settings = copy.deepcopy(REDUCTIONS["quickstart"]["settings"])
    model = settings["model"]["init_args"]
    model["backbone"] = {"init_args": {"pretrained": str(pretrained), "variant": None}}
    for name in ("objective", "judge"):
        classifier = tiny_classifier(folder / name, ["tiger cat", "bullfrog", "other"])
        model[name] = {"init_args": {"classifier": str(classifier)}}
    settings["trainer"] |= {"accelerator": "cpu", "accumulate_grad_batches": 1}
    return settings


@pytest.mark.parametrize(("backbone", "make_pipeline"), [("sd15", tiny_pipeline), ("sdxl", tiny_xl_pipeline)])
def test_class_tokens_run_on_backbones(backbone, make_pipeline, tmp_path, run):
    settings = few_steps(make_pipeline(tmp_path / "pipeline"), tmp_path)
    configs = [CONFIGS / "backbones" / f"{backbone}.yaml", CONFIGS / "methods" / "class_token.yaml"]
    folder = run("fit", configs, settings)
    assert sorted(path.stem for path in folder.glob("embeddings/*")) == ["bullfrog", "tiger-cat"]
    assert (folder / "table.csv").is_file()
