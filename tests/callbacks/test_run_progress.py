"""Progress of runs, and what every logger gets."""

import re

import yaml
from lightning.pytorch.callbacks import TQDMProgressBar
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tokenlearn.progress
from tokenlearn.main import main


def test_a_fit_tells_how_far_it_is_and_logs_what_it_does(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokenlearn.progress, "INTERVAL", 0.0)
    changes = {"model.init_args.judge": None, "trainer.max_steps": 2, "trainer.enable_progress_bar": True}
    main(["fit", "--config", tiny_config(changes)])
    written = capsys.readouterr()
    assert re.search(r"Training: 1 of 2 steps, \d+ s, about \d+ s left, train/loss [\d.]+", written.err)
    assert re.search(r"Training: 0 of 2 steps, \d+ s, 1 network evaluation into the next", written.err)
    assert re.search(r"Validation: \d of \d batch", written.err)
    assert "Epoch" not in written.err + written.out
    run = tmp_path / "run"
    settings = yaml.safe_load((run / "hparams.yaml").read_text())
    assert settings["model"]["class_path"].endswith("ClassTokens")
    assert settings["trainer"]["max_steps"] == 2
    scalars = set()
    for events in run.glob("events.out.*"):
        accumulator = EventAccumulator(str(events))
        scalars |= set(accumulator.Reload().Tags()["scalars"])
    assert {"train/loss", "train/gradient_norm", "train/learning_rate"} <= scalars


def test_a_bar_of_the_user_is_left_alone(tiny_config, capsys, monkeypatch):
    monkeypatch.setattr(tokenlearn.progress, "INTERVAL", 0.0)
    changes = {
        "model.init_args.judge": None,
        "trainer.max_steps": 1,
        "trainer.enable_progress_bar": True,
        "trainer.callbacks": [{"class_path": f"{TQDMProgressBar.__module__}.TQDMProgressBar"}],
    }
    main(["fit", "--config", tiny_config(changes)])
    assert "Training: " not in capsys.readouterr().err
