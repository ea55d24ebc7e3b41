import json

import pytest

from benchmarks import time_to_accuracy
from benchmarks.common import instantiate, parse_config
from benchmarks.time_to_accuracy import UntilAccurate, published, speedup
from tokenlearn.diffusion import LastK
from tokenlearn.errors import UserError


@pytest.fixture
def config(tiny_config):
    return tiny_config(
        {"model.init_args.sampling": {"steps": 3}, "model.init_args.gradient": {"class_path": "OneStep"}}
    )


def test_a_training_that_does_not_get_there_has_the_cap(config, capsys):
    time_to_accuracy.main(config, accuracy=1.0, images=2, cap=0.1, check_every=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("  ")][:2] == ["ours", "published"]
    assert json.loads(lines[-1]) == {
        "ours_seconds": 0.1,
        "published_seconds": 0.1,
        "speedup": None,
        "capped": ["ours", "published"],
    }


def test_seconds_are_of_the_first_check_that_is_good_enough(config, monkeypatch, capsys):
    scores = iter([0.1, 0.5, 0.9, 0.0, 0.95])
    monkeypatch.setattr(UntilAccurate, "_judged", lambda self, trainer: next(scores))
    time_to_accuracy.main(config, accuracy=0.85, images=1, cap=1000, check_every=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[:-1]] == [
        "ours", "  step 0", "  step 1", "  step 2", "published", "  step 0", "  step 1",
    ]  # fmt: skip
    figures = json.loads(lines[-1])
    assert figures["capped"] == []
    assert figures["ours_seconds"] > 0
    assert figures["published_seconds"] > 0


@pytest.mark.parametrize(
    ("capped", "expected"),
    [([], 4.2), (["published"], ">= 4.2"), (["ours"], "<= 4.2"), (["ours", "published"], None)],
)
def test_a_cap_makes_the_speedup_a_bound(capped, expected):
    assert speedup({"ours": 100.0, "published": 420.0}, capped) == expected


def test_the_rival_has_the_published_settings(config):
    made = instantiate(parse_config(config), published())
    assert (made.model.gradient, made.data.batch_size) == (LastK(1, checkpointing=False), 1)
    assert made.trainer.accumulate_grad_batches == 5
    assert made.model.training_pipeline.sampling.guidance == made.model.sampling.guidance
    group = made.model.optimizer(made.model.bank.parameters()).param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (1.25e-3, 0.01)


def test_the_published_seeds_are_five(config, monkeypatch):
    seen = []
    original = UntilAccurate.on_train_batch_start

    def record(self, trainer, module, batch, *args):
        original(self, trainer, module, batch, *args)
        seen.append(batch.seeds)

    monkeypatch.setattr(UntilAccurate, "on_train_batch_start", record)
    time_to_accuracy.main(config, accuracy=1.0, images=1, cap=0.01, check_every=2)
    ours, published = [seeds for seeds in seen if len(seeds) == 2], [seeds for seeds in seen if len(seeds) == 1]
    assert len({seed for seeds in ours for seed in seeds}) == 2 * len(ours)
    assert {seed for seeds in published for seed in seeds} == set(range(5))


def test_bad_input_is_one_line(config):
    with pytest.raises(UserError, match=r"accuracy.*got 1\.5, 1 and 20"):
        time_to_accuracy.main(config, accuracy=1.5, cap=1)
