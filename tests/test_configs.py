"""Every shipped config runs as users run it, at reduced size."""

import json
from pathlib import Path

import pytest
import yaml

from tokenlearn.main import main

ROOT = Path(__file__).parents[1]
BUNDLED = sorted([ROOT / "configs" / "quickstart.yaml", *(ROOT / "configs" / "portraits").glob("*.yaml")])
OTHERS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(BUNDLED))

FIT = [
    "--trainer.max_steps=1",
    "--model.init_args.num_inference_steps=2",
    "--model.init_args.gradient_steps=1",
    "--data.init_args.batch_size=1",
    "--data.init_args.batches_per_epoch=1",
    "--data.init_args.validation_images=1",
    "--data.init_args.test_images=1",
]
PREDICT = ["--model.init_args.num_inference_steps=2", "--data.init_args.seeds=[3]"]


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("config", BUNDLED, ids=lambda path: path.stem)
def test_bundled_configs_run(config, tmp_path, capsys):
    settings = yaml.safe_load(config.read_text())
    common = ["--config", str(config), "--output_dir", str(tmp_path), "--trainer.enable_progress_bar=false"]
    if settings["model"]["class_path"] == "Generate":
        main(["predict", *common, *PREDICT])
        assert len(list((tmp_path / "images").glob("*.png"))) == len(settings["data"]["init_args"]["prompts"])
    else:
        main(["fit", *common, *FIT])
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert len(summary["embeddings"]) == len(settings["model"]["init_args"]["classes"])
        (best,) = (tmp_path / "checkpoints").glob("best-*.ckpt")
        main(["validate", *common, *FIT, "--ckpt_path", str(best)])
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(tmp_path)


@pytest.mark.parametrize("config", OTHERS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_other_configs_are_valid(config, capsys):
    """They need models that are not here, so only their settings are checked."""
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(config), "--print_config"])
    assert stopped.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"].endswith("ClassTokens")
