import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.command_line import error_of
from tests.conftest import CLASSES
from tests.tiny import tiny_classifier
from tokenlearn.main import COMMANDS, main
from tokenlearn.paths import resolve_config
from tokenlearn.tokens import load_embedding, save_embedding


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.init_args.sampling.stpes": 3}, ["stpes"]),
        ({"model.init_args.backbone.init_args.pretrained": "no/such/folder/here"}, ["no/such/folder/here"]),
        ({"model.init_args.backbone.init_args.pretrained": "owner/no-such-model"}, ["owner/no-such-model"]),
        ({"model.init_args.classes": {"wizzard": None}}, ["wizzard", "wizard"]),
        ({"model.init_args.classes": {}}, ["classes", "empty"]),
        ({"model.init_args.tokens.placeholder": "king"}, ["king", "vocabulary"]),
        ({"model.init_args.tokens.num_vectors": 90}, ["77"]),
        ({"model.init_args.gradient.init_args.steps": 0}, ["steps", "0"]),
        ({"model.init_args.gradient": None}, ["model.gradient", "null", "LastK"]),
        ({"model.init_args.sampling.steps": 0}, ["sampling.steps", "0"]),
        ({"model.init_args.sampling.solver": "DIM"}, ["DIM", "DDIM"]),
        ({"model.init_args.tokens.initial_embeddings": ["missing.safetensors"]}, ["missing.safetensors"]),
        ({"data.init_args.templates": ["a photo of a wizard"]}, ["a photo of a wizard", "{}"]),
        ({"data.init_args.batch_size": 0}, ["batch_size", "0"]),
        ({"trainer.precision": "8-mixed"}, ["8-mixed"]),
    ],
    ids=lambda value: next(iter(value)).split(".")[-1] if isinstance(value, dict) else "",
)
def test_bad_settings_give_one_line(tiny_config, capsys, changes, words):
    if "model.init_args.tokens.placeholder" in changes:
        changes = changes | {"model.init_args.classes": {"wizard": None}}
    error = error_of(["fit", "--config", tiny_config(changes)], capsys)
    for word in words:
        assert word in error


def test_missing_config_file(capsys):
    assert "nowhere.yaml" in error_of(["fit", "--config", "nowhere.yaml"], capsys)


def test_half_downloaded_model(tiny_config, tiny_models, tmp_path, capsys):
    broken = shutil.copytree(tiny_models / "pipeline", tmp_path / "broken")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    changes = {"model.init_args.backbone.init_args.pretrained": str(broken)}
    assert "diffusion_pytorch_model.safetensors" in error_of(["fit", "--config", tiny_config(changes)], capsys)


def test_truncated_classifier(tiny_config, tmp_path, capsys):
    folder = tiny_classifier(tmp_path / "cut", CLASSES)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    error = error_of(
        ["fit", "--config", tiny_config({"model.init_args.objective.init_args.classifier": str(folder)})], capsys
    )
    assert str(folder) in error


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_unwritable_output_folder(tiny_config, tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    error = error_of(["fit", "--config", tiny_config({"output_dir": str(locked / "run")})], capsys)
    assert "cannot write" in error


def test_output_folder_that_is_a_file(tiny_config, tmp_path, capsys):
    (tmp_path / "taken").touch()
    error = error_of(["fit", "--config", tiny_config({"output_dir": str(tmp_path / "taken")})], capsys)
    assert str(tmp_path / "taken") in error


@pytest.fixture
def generate_config(tiny_models, tmp_path):
    def write(embeddings=(), prompts=("a photo of a <wizard> wizard", "a photo of a king")):
        config = {
            "model": {
                "class_path": "Generate",
                "init_args": {
                    "backbone": {
                        "class_path": "StableDiffusion",
                        "init_args": {"pretrained": str(tiny_models / "pipeline")},
                    },
                    "embeddings": [str(path) for path in embeddings],
                    "sampling": {"steps": 4},
                },
            },
            "data": {"class_path": "PromptList", "init_args": {"prompts": list(prompts), "seeds": [1, 2]}},
            "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
            "output_dir": str(tmp_path / "images-run"),
        }
        path = tmp_path / "generate.yaml"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    return write


def wizard_file(folder, width=16):
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    return save_embedding(folder / "wizard.safetensors", "<wizard>", [vectors], {})


def test_predict_from_embedding_file(generate_config, tmp_path, capsys):
    main(["predict", "--config", generate_config([wizard_file(tmp_path)])])
    run = tmp_path / "images-run"
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(run)
    images = sorted((run / "images").glob("*.png"))
    assert [path.name for path in images] == [
        "000-a-photo-of-a-wizard-wizard-seed1.png",
        "000-a-photo-of-a-wizard-wizard-seed2.png",
        "001-a-photo-of-a-king-seed1.png",
        "001-a-photo-of-a-king-seed2.png",
    ]
    assert Image.open(images[0]).size == (16, 16)
    assert (run / "contact_sheet.png").is_file()


def test_predict_from_checkpoint_equals_predict_from_its_embedding_file(tiny_config, generate_config, tmp_path):
    main(["fit", "--config", tiny_config({"model.init_args.judge": None, "trainer.max_steps": 2})])
    run = tmp_path / "run"
    main(["predict", "--config", generate_config([run / "embeddings" / "wizard-tl.safetensors"])])
    image = tmp_path / "images-run" / "images" / "000-a-photo-of-a-wizard-wizard-seed1.png"
    from_file = np.asarray(Image.open(image))
    image.unlink()
    (best,) = (run / "checkpoints").glob("best-*.ckpt")
    main(["predict", "--config", generate_config(), "--ckpt_path", str(best)])
    assert np.array_equal(np.asarray(Image.open(image)), from_file)


@pytest.mark.parametrize(
    ("break_file", "words"),
    [
        (lambda path: wizard_file(path.parent, width=24), ["24", "16"]),
        (lambda path: path.write_bytes(path.read_bytes()[:40]), ["wizard.safetensors"]),
        (lambda path: path.write_bytes(b"\0" * 300), ["wizard.safetensors"]),
        (lambda path: path.unlink(), ["wizard.safetensors"]),
    ],
    ids=["width", "truncated", "corrupt", "missing"],
)
def test_bad_embedding_file(generate_config, tmp_path, capsys, break_file, words):
    path = wizard_file(tmp_path)
    break_file(path)
    error = error_of(["predict", "--config", generate_config([path])], capsys)
    for word in words:
        assert word in error


def test_unsafe_pickle(generate_config, tmp_path, capsys):
    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    torch.save({"string_to_param": {"*": Harm()}}, tmp_path / "wizard.pt")
    error = error_of(["predict", "--config", generate_config([tmp_path / "wizard.pt"])], capsys)
    assert "wizard.pt" in error


def test_checkpoint_of_another_backbone(tiny_config, generate_config, tmp_path, capsys):
    main(["fit", "--config", tiny_config({"model.init_args.judge": None, "trainer.max_steps": 1})])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["tokenlearn"]["vocabulary_hash"] = "another"
    for about in checkpoint["tokenlearn"]["metadata"].values():  # as in a file from before the words were noted
        about |= {"vocabulary_hash": "another", "vocabulary": "[]"}
    torch.save(checkpoint, last)
    with pytest.warns(UserWarning, match=r"'<wizard>' and 1 more were learned on .*text encoder differs"):
        main(["predict", "--config", generate_config(), "--ckpt_path", str(last)])
    error = error_of(["fit", "--config", tiny_config({"trainer.max_steps": 2}), "--ckpt_path", str(last)], capsys)
    assert "text encoder differs" in error


@pytest.mark.parametrize("form", ["a1111", "diffusers", "onetrainer"])
def test_export_from_checkpoint(tiny_config, tmp_path, capsys, form):
    main(["fit", "--config", tiny_config({"model.init_args.judge": None, "trainer.max_steps": 1})])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    out = tmp_path / "exported"
    main(["export", "--ckpt_path", str(last), "--format", form, "--output_dir", str(out), "--scale", "2"])
    paths = capsys.readouterr().out.split()
    assert paths == [str(out / "wizard-tl.safetensors"), str(out / "pirate-tl.safetensors")]
    bank = torch.load(last, weights_only=True)["state_dict"]["bank.vectors.0"]
    file = load_embedding(paths[0])
    assert file.token == "<wizard>"
    torch.testing.assert_close(file.vectors[0], 2 * bank[:1])
    assert file.metadata["class"] == "wizard"


def test_export__bad_input(tmp_path, capsys):
    assert "no checkpoint" in error_of(["export", "--ckpt_path", str(tmp_path / "none.ckpt")], capsys)
    assert "either" in error_of(["export"], capsys)
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 cut")
    assert "cannot be read" in error_of(["export", "--ckpt_path", str(tmp_path / "cut.ckpt")], capsys)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "no learned tokens" in error_of(["export", "--ckpt_path", str(tmp_path / "other.ckpt")], capsys)
    path = wizard_file(tmp_path)
    error = error_of(["export", "--embedding", str(path), "--tokens", '["<pirate>"]'], capsys)
    assert "<pirate>" in error


def test_convert_a_foreign_file(tmp_path):
    save_file({"<wizard>": torch.ones(1, 16)}, tmp_path / "foreign.safetensors")
    main(["export", "--embedding", str(tmp_path / "foreign.safetensors"), "--output_dir", str(tmp_path / "out")])
    assert load_file(tmp_path / "out" / "wizard-tl.safetensors").keys() == {"emb_params"}


def test_test_judges_a_checkpoint(tiny_config, tmp_path, capsys):
    main(["fit", "--config", tiny_config({"trainer.max_steps": 1})])
    fitted = json.loads((tmp_path / "run" / "summary.json").read_text())
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    config = tiny_config({"output_dir": str(tmp_path / "tested")}, "test")
    main(["test", "--config", config, "--ckpt_path", str(last)])
    summary = json.loads((tmp_path / "tested" / "summary.json").read_text())
    assert summary.keys() == {f"mean_accuracy_{kind}" for kind in ("name", "described", "start", "token")}
    assert summary["mean_accuracy_name"] == fitted["judged_accuracy_name"]
    table = (tmp_path / "tested" / "table.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["class", "wizard", "pirate"]
    assert "judged by" in capsys.readouterr().out


def test_test_without_a_judge(tiny_config, capsys):
    error = error_of(["test", "--config", tiny_config({"model.init_args.judge": None})], capsys)
    assert "model.judge" in error


def test_run_folder_is_named_after_config_and_time(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(Path(tiny_config({"model.init_args.judge": None, "trainer.max_steps": 1})).read_text())
    del config["output_dir"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "mine.yaml"])
    run = capsys.readouterr().out.strip().splitlines()[-1]
    assert run.startswith("outputs/mine/20")
    assert (tmp_path / run / "config.yaml").is_file()


def test_help_names_every_command_and_how_to_list_settings(capsys):
    main(["--help"])
    page = capsys.readouterr().out
    for words in (*COMMANDS, "--config", "--model.help", "--print_config"):
        assert words in page
    examples = [line for line in page.splitlines() if line.strip().startswith("tokenlearn ")]
    for config in re.findall(r"--config (\S+)", "\n".join(examples)):
        assert resolve_config(config).is_file()
    main([])
    assert capsys.readouterr().out == page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["fti"], ["fti", *COMMANDS]), (["--config", "mine.yaml"], ["--config", *COMMANDS]), (["fit", "--config"], [])],
)
def test_bad_commands(arguments, words, capsys):
    error = error_of(arguments, capsys)
    for word in words:
        assert word in error


def test_commands_say_a_first_line_at_once(capsys):
    error_of(["fit", "--config", "nowhere.yaml"], capsys)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "nowhere.yaml"])
    assert capsys.readouterr().err.splitlines()[0].startswith("tokenlearn fit: ")


def settings_of(arguments, capsys):
    """The settings that a run with these arguments would use."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.fixture
def parts(tiny_config, tmp_path):
    """A tiny config in two files: the backbone, and the rest."""
    method = yaml.safe_load(Path(tiny_config()).read_text())
    backbone = {"model": {"init_args": {"backbone": method["model"]["init_args"].pop("backbone")}}}
    paths = [tmp_path / "backbone.yaml", tmp_path / "method.yaml"]
    for path, part in zip(paths, (backbone, method), strict=True):
        path.write_text(yaml.safe_dump(part))
    return [str(path) for path in paths]


def test_configs_combine_in_any_order(parts, tiny_config, capsys):
    whole = settings_of(["fit", "--config", tiny_config()], capsys)
    for order in (parts, parts[::-1]):
        assert settings_of(["fit", *(f"--config={path}" for path in order)], capsys) == whole


def test_later_configs_and_options_override(parts, tmp_path, capsys):
    mine = {
        "model": {"init_args": {"sampling": {"steps": 3}, "classes": {"pirate": None}}},
        "data": {"init_args": {"batch_size": 5}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    options = ["fit", "--model.sampling.guidance=2", "--trainer.max_steps", "9"]
    configs = [argument for path in (*parts, tmp_path / "mine.yaml") for argument in ("-c", str(path))]
    settings = settings_of([*options, *configs], capsys)
    model = settings["model"]["init_args"]
    assert model["classes"] == {"pirate": None}  # a value of its own, not a section: replaced as a whole
    assert (model["sampling"]["steps"], model["sampling"]["guidance"]) == (3, 2.0)
    assert model["backbone"]["class_path"].endswith("StableDiffusion")
    assert settings["data"]["init_args"]["batch_size"] == 5
    assert settings["trainer"]["max_steps"] == 9


def test_another_class_starts_afresh(parts, tmp_path, capsys):
    other = {"data": {"class_path": "PromptList", "init_args": {"prompts": ["a king"]}}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    settings = settings_of(["predict", *(f"-c={path}" for path in (*parts, tmp_path / "other.yaml"))], capsys)
    assert settings["data"]["class_path"].endswith("PromptList")
    assert settings["data"]["init_args"]["prompts"] == ["a king"]


def test_config_that_is_not_yaml(parts, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("model: {")
    for files in ([], parts):
        error = error_of(["fit", *(f"-c={path}" for path in (*files, tmp_path / "bad.yaml"))], capsys)
        assert "bad.yaml" in error or not files


def test_runs_of_a_saved_config_leave_its_own_run_alone(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tiny_config({"model.init_args.judge": None, "trainer.max_steps": 1, "output_dir": None})
    main(["fit", "--config", config])
    old = tmp_path / capsys.readouterr().out.strip().splitlines()[-1]
    before = {path: path.stat().st_mtime_ns for path in old.rglob("*") if path.is_file()}
    assert old / "config.yaml" in before
    main(["fit", "--config", str(old / "config.yaml"), "--output_dir", "new"])
    assert {path: path.stat().st_mtime_ns for path in old.rglob("*") if path.is_file()} == before
    for pattern in ("checkpoints/last.ckpt", "config.yaml", "events.out.*"):
        assert list((tmp_path / "new").glob(pattern)), pattern
