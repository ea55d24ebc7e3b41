import json

import pytest

from benchmarks import class_token_gradient
from benchmarks.class_token_gradient import figures
from tokenlearn.errors import UserError


@pytest.fixture
def config(tiny_config):
    def write(**changes):
        options = {"sampling": {"steps": 3}} | changes
        return tiny_config({f"model.init_args.{name}": value for name, value in options.items()})

    return write


def test_every_gradient_is_trained_and_judged_on_the_same(config, capsys):
    class_token_gradient.main(
        config(), last_k=(1, 3), full=("Checkpointed", "Leapfrog"), max_steps=4, check_every=2, images=2
    )
    lines = capsys.readouterr().out.splitlines()
    results = json.loads(lines[-1])
    assert list(results) == ["last 1", "last 3", "Checkpointed", "Leapfrog"]
    assert [list(row["accuracy"]) for row in results.values()] == [["0", "2", "4"]] * 4
    assert len({row["accuracy"]["0"] for row in results.values()}) == 1
    assert all(row["seconds_per_step"] > 0 for row in results.values())
    # The last three steps of three are all steps.
    assert results["last 3"]["accuracy"] == results["Checkpointed"]["accuracy"]
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
    with pytest.raises(UserError, match=r"check_every.*4.*5"):
        class_token_gradient.main(config(), max_steps=4, check_every=5)
    with pytest.raises(UserError, match=r"model\.judge"):
        class_token_gradient.main(config(judge=None))
