import csv

import pytest
import torch

from benchmarks import class_token_sweep
from benchmarks.class_token_sweep import VARIANTS, OverTime, markdown
from benchmarks.common import instantiate, parse_config
from tokenlearn.errors import UserError

SETTINGS = ["config", "last 2", "batch 3"]


@pytest.fixture
def config(tiny_config):
    def write(**changes):
        options = {
            "sampling": {"steps": 3},
            "gradient": {"class_path": "OneStep"},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}},
        } | changes
        return tiny_config({f"model.init_args.{name}": value for name, value in options.items()})

    return write


def test_a_sweep_trains_what_is_not_in_its_file(config, tmp_path, capsys, monkeypatch):
    trained, train = [], class_token_sweep.train

    def record(settings, changes, seed, seconds):
        trained.append((len(trained), seed))
        return train(settings, changes, seed, seconds)

    monkeypatch.setattr(class_token_sweep, "train", record)
    path = tmp_path / "sweep.csv"
    settings = {"fit_config": config(), "seconds": 0.2, "images": 2, "output_file": str(path)}
    class_token_sweep.main(variants=("config", "last 2"), seeds=(0, 1), **settings)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["seed"]) for row in rows] == [(n, s) for n in ("config", "last 2") for s in "01"]
    assert all(float(row["cpu_seconds"]) >= 0.2 for row in rows)
    assert all(int(row["steps"]) >= 1 for row in rows)
    assert all(0 <= float(row[moment]) <= 1 for row in rows for moment in class_token_sweep.MOMENTS)
    assert len({row["step 0"] for row in rows}) == 1  # the same images of the same word
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[-3:-1]] == [["| config", "2"], ["| last 2", "2"]]
    class_token_sweep.main(variants=("config", "batch 3"), **settings)
    assert len(trained) == 5  # one of the new name
    class_token_sweep.main(variants=("config",), **(settings | {"seconds": 0.1}))
    assert len(trained) == 6  # other settings


def test_the_rate_falls_with_the_time(monkeypatch):
    clock = OverTime(10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    trainer = type("Trainer", (), {"optimizers": [optimizer]})()
    clock.on_train_start(trainer, None)
    rates = []
    for clock.used in (0, 5, 10, 12):
        clock.on_train_batch_start(trainer)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.4, 0.2, 0, 0])


def test_a_step_may_pass_several_moments(config, monkeypatch):
    monkeypatch.setattr(class_token_sweep.time, "process_time", iter([0.0, 7.0, 7.0, 11.0]).__next__)
    clock = OverTime(10)
    settings = parse_config(config())
    changes = {"data.init_args.validation_images": 1, "data.init_args.batches_per_epoch": 100}
    class_token_sweep.fit_quietly(settings, changes, 0, clock, 100, 100)
    assert (clock.steps, clock.used, len(clock.accuracies)) == (2, 11.0, 4)


def test_every_variant_makes_a_task(config):
    settings = parse_config(config())
    for name, changes in VARIANTS.items():
        made = instantiate(settings, changes)
        if name.startswith(("last", "detached")):
            assert str(made.model.gradient.num_steps(100)) == name.split()[1]
        if name.startswith("learning rate"):
            optimizer = made.model.optimizer(made.model.bank.parameters())
            assert f"{optimizer.param_groups[0]['lr']:g}" == name.split()[2]
        if name.startswith("guidance"):
            assert f"{made.model.training_pipeline.sampling.guidance:g}" == name.split()[1]


def test_the_table_has_means_over_seeds():
    row = {"variant": "config", "step 0": "0", "1/3": "0.25", "2/3": "0.5", "end": "1", "steps": "10"}
    lines = markdown([row, row | {"end": "0.5", "steps": "20"}, row | {"variant": "last 1"}])
    assert lines[0] == "| variant | seeds | step 0 | 1/3 | 2/3 | end | steps |"
    assert lines[2] == "| config | 2 | 0% | 25% | 50% | 75% | 15 |"
    assert lines[3].startswith("| last 1 | 1 |")


def test_bad_input_is_one_line(config, tmp_path):
    with pytest.raises(UserError, match=r"no variant 'last 3'; choose among config"):
        class_token_sweep.main(config(), variants=("last 3",))
    with pytest.raises(UserError, match=r"seconds must be above 0"):
        class_token_sweep.main(config(), seconds=0)
    with pytest.raises(UserError, match=r"model\.judge"):
        class_token_sweep.main(config(judge=None))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"other columns"):
        class_token_sweep.main(config(), output_file=str(tmp_path / "other.csv"))
