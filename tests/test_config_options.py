"""Options that set settings within settings to null."""

import json

import pytest
import yaml

from tokenlearn.configs import combine_configs
from tokenlearn.main import main


@pytest.fixture
def files(tmp_path):
    contents = {
        "method": {"model": {"class_path": "ClassTokens", "init_args": {"tokens": {"num_vectors": 2}}}},
        "backbone": {"model": {"init_args": {"backbone": {"class_path": "StableDiffusion"}}}},
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return [argument for name in contents for argument in ("--config", str(tmp_path / f"{name}.yaml"))]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--model.tokens.initial_words", {"init_args": {"tokens": {"initial_words": None}}}),
        ("--model.init_args.tokens.initial_words", {"init_args": {"tokens": {"initial_words": None}}}),
        ("--model.backbone.variant", {"init_args": {"backbone": {"init_args": {"variant": None}}}}),
    ],
)
@pytest.mark.parametrize("apart", [False, True])
def test_null_becomes_a_config_after_the_files(files, option, expected, apart):
    given = [option, "null"] if apart else [f"{option}=null"]
    options, name = combine_configs([*files, "--trainer.max_steps=1", *given, "--model.judge=null"])
    assert name == "backbone"
    assert json.loads(options[options.index("--trainer.max_steps=1") - 1]) == {"model": expected}
    assert options[-2:] == ["--trainer.max_steps=1", "--model.judge=null"]


def test_a_null_reaches_the_settings(tiny_config, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", tiny_config(), "--model.tokens.initial_words", "null", "--print_config"])
    assert stopped.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["tokens"]["initial_words"] is None
