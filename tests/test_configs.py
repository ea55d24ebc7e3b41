"""Every shipped config runs as users run it, at reduced size."""

import json
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from PIL import Image

from tokenlearn.main import main
from tokenlearn.tokens import embedding_file_name, save_embedding

ROOT = Path(__file__).parents[1]
BUNDLED = sorted([ROOT / "configs" / "quickstart.yaml", *(ROOT / "configs" / "portraits").glob("*.yaml")])
OTHERS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(BUNDLED))

FIT = [
    "--trainer.max_steps=1",
    "--model.init_args.num_inference_steps=2",
    "--data.init_args.batch_size=1",
    "--data.init_args.batches_per_epoch=1",
    "--data.init_args.validation_images=1",
    "--data.init_args.test_images=1",
]
FIT_OF = {
    "ClassTokens": [
        *FIT,
        "--model.init_args.gradient_steps=1",
        "--model.init_args.search_words=12",
        "--model.init_args.search_steps=1",
    ],
    "Caso": [
        *FIT,
        "--model.init_args.collapse_batches=1",
        "--model.init_args.initialiser_words=2",
        "--model.init_args.test.num_inference_steps=5",
        "--data.init_args.source=portraits:60",
        "--data.init_args.transfer_images=1",
    ],
    "TextualInversion": [*FIT, "--data.init_args.source=portraits:60"],
}
SEGA_TEST = [
    "--model.num_inference_steps=4",
    "--model.num_seeds=1",
    "--model.compared_seeds=1",
    "--model.style_seeds=0",
    "--model.monotonicity_seeds=1",
    "--model.monotonicity_scales=[-8, 8]",
]
PREDICT = ["--model.init_args.num_inference_steps=2", "--data.init_args.seeds=[3]"]


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def editing(model, folder):
    """Options of an edit of one picture, with any vectors for the tokens that the config names."""
    pretrained = ROOT / model["backbone"]["init_args"]["pretrained"]
    width = json.loads((pretrained / "text_encoder" / "config.json").read_text())["hidden_size"]
    tokens = {token for edit in (*model["edits"], model["interpolations"]) for token in edit}
    files = [
        save_embedding(folder / embedding_file_name(token), token, [torch.ones(1, width)], {}) for token in tokens
    ]
    Image.new("RGB", (90, 70)).save(folder / "me.jpg")
    return [
        f"--model.images={folder / 'me.jpg'}",
        f"--model.embeddings=[{', '.join(map(str, files))}]",
        "--model.num_inference_steps=5",
    ]


def shortened(settings, folder):
    """A config whose cases have one picture, one update and few steps each."""
    for case in settings["model"]["init_args"]["cases"]:
        task = case["task"]["init_args"]
        task |= {"optimisation_steps": 1, "candidates": 1, "seeds": [3]}
        if "optimise_from" not in task:
            task["num_inference_steps"] = 2
    path = folder / "shortened.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def number_of_tokens(method, model):
    """One for each class; an attribute without a list of classes is there or not."""
    if method == "ClassTokens":
        return len(model["classes"])
    return sum(2 if classes is None else len(classes) for classes in model["attributes"].values())


@pytest.mark.parametrize("config", BUNDLED, ids=lambda path: path.stem)
def test_bundled_configs_run(config, tmp_path, capsys):
    settings = yaml.safe_load(config.read_text())
    method, model, run = settings["model"]["class_path"], settings["model"]["init_args"], tmp_path / "run"
    common = ["--config", str(config), "--output_dir", str(run), "--trainer.enable_progress_bar=false"]
    if method == "Generate":
        main(["predict", *common, *PREDICT])
        assert len(list((run / "images").glob("*.png"))) == len(settings["data"]["init_args"]["prompts"])
    elif method == "Edit":
        main(["predict", *common, *editing(model, tmp_path)])
        assert len(list((run / "images").glob("*/me.png"))) == len(model["edits"])
        assert (run / "strips" / "me.png").is_file()
    elif method == "Sega":
        main(["predict", *common, "--model.num_inference_steps=4", "--model.seeds=[3]"])
        assert len(list((run / "images").glob("*/*seed3.png"))) == len(model["edits"]) + 2  # plain, and all together
        assert (run / "contact_sheet.png").is_file()
    elif method == "Doodl":
        fewer = [] if "optimise_from" in model else ["--model.num_inference_steps=4"]
        main(["predict", *common, *fewer, "--model.optimisation_steps=1", "--model.seeds=[3]"])
        written = ["images/doodl", "strips", "latents", "losses"] + ["images/before"] * ("prompts" in model)
        for folder in written:
            assert len(list((run / folder).iterdir())) == len(model.get("prompts", [model.get("source")]))
    elif method == "DoodlTest":
        main(["test", "--config", str(shortened(settings, tmp_path)), *common[2:]])
        rows = {case["row"].replace(" ", "_") for case in model["cases"]}
        summary = json.loads((run / "summary.json").read_text())
        assert {f"{row}_{name}" for row in rows for name in ("none", "one_step", "doodl")} <= summary.keys()
        assert (run / "table.csv").is_file()
    elif method == "SegaTest":
        main(["test", *common, *SEGA_TEST])
        summary = json.loads((run / "summary.json").read_text())
        assert {"add_success", "remove_success", "untouched_kept", "rank_correlation"} <= summary.keys()
        assert (run / "table.csv").is_file()
    else:
        options = list(FIT_OF[method])
        if method == "Caso":
            options.append(f"--model.init_args.test.strengths=[{model['test']['strength']}]")
        main(["fit", *common, *options])
        summary = json.loads((run / "summary.json").read_text())
        assert len(summary["embeddings"]) == number_of_tokens(method, model)
        (best,) = (run / "checkpoints").glob("best-*.ckpt")
        again = "test" if method == "Caso" else "validate"  # a fit of class tokens ends with the test
        main([again, *common, *options, "--ckpt_path", str(best)])
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(run)


@pytest.mark.parametrize("config", OTHERS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_other_configs_are_valid(config, capsys):
    """They need models that are not here, so only their settings are checked."""
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(config), "--print_config"])
    assert stopped.value.code == 0
    method = yaml.safe_load(capsys.readouterr().out)["model"]["class_path"]
    assert method.rpartition(".")[2] in ("ClassTokens", "Caso", "Doodl", "Generate")
