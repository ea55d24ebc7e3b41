import json

import pytest
import yaml

from benchmarks import class_token_chain
from benchmarks.class_token_chain import figures
from tokenlearn.errors import UserError


@pytest.fixture
def config(tiny_models, tmp_path):
    def write(**changes):
        options = {
            "backbone": {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_models / "pipeline")}},
            "classifier": str(tiny_models / "guide"),
            "judge": str(tiny_models / "judge"),
            "classes": {"wizard": None, "pirate": None},
            "num_inference_steps": 3,
        }
        data = {"templates": ["a portrait of a {}"], "batch_size": 2, "batches_per_epoch": 2}
        settings = {
            "seed_everything": 0,
            "model": {"class_path": "ClassTokens", "init_args": options | changes},
            "data": {"class_path": "PromptDataModule", "init_args": data},
            "trainer": {"accelerator": "cpu"},
        }
        path = tmp_path / "class_token.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    return write


def test_every_way_is_trained_and_judged_on_the_same(config, capsys):
    class_token_chain.main(
        config(), last_k=(1, 3), chains=("checkpointed", "leapfrog"), max_steps=4, check_every=2, images=2
    )
    lines = capsys.readouterr().out.splitlines()
    results = json.loads(lines[-1])
    assert list(results) == ["last 1", "last 3", "checkpointed", "leapfrog"]
    assert [list(own["accuracy"]) for own in results.values()] == [["0", "2", "4"]] * 4
    assert len({own["accuracy"]["0"] for own in results.values()}) == 1
    assert all(own["seconds_per_step"] > 0 for own in results.values())
    # All three steps of three are the full chain.
    assert results["last 3"]["accuracy"] == results["checkpointed"]["accuracy"]
    assert [line.split("  ")[0] for line in lines[2:6]] == list(results)


def test_gains_are_until_the_best_check():
    checks = [(0, 0.0, 0.1), (5, 2.0, 0.5), (10, 4.0, 0.9), (15, 6.0, 0.8)]
    assert figures(checks) == {
        "accuracy": {0: 0.1, 5: 0.5, 10: 0.9, 15: 0.8},
        "seconds_per_step": 0.4,
        "gain_per_step": 0.08,
        "gain_per_second": 0.2,
    }


def test_bad_input_is_one_line(config):
    with pytest.raises(UserError, match="check_every must be from 1 to max_steps 4, got 5"):
        class_token_chain.main(config(), max_steps=4, check_every=5)
    with pytest.raises(UserError, match=r"has no judge; set model\.judge"):
        class_token_chain.main(config(judge=None))
