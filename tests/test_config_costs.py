"""What the configs for real models spend on validation, and when they stop."""

from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CONFIGS / "methods").glob("*.yaml"))}
FITS = [name for name, config in METHODS.items() if "max_steps" in config["trainer"]]


def validation_images(config):
    """Images that a validation makes, each of all sampling steps or of one, as in the training."""
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    if "classes" in model:
        return len(model["classes"]) * data["validation_images"]
    tokens = sum(len(names) for names in model["attributes"].values())
    return tokens * data["held_out"]["validation"]


def test_there_are_trainings():
    assert FITS == ["caso", "class_token", "textual_inversion"]


@pytest.mark.parametrize("name", FITS)
def test_validation_costs_less_than_training(name):
    data = METHODS[name]["data"]["init_args"]
    training = data["batches_per_epoch"] * data["batch_size"]
    assert validation_images(METHODS[name]) <= 0.25 * training
    assert data.get("eval_batch_size", data["batch_size"]) <= data["batch_size"]


@pytest.mark.parametrize("name", [name for name in FITS if name != "textual_inversion"])
def test_training_stops_at_the_highest_score(name):
    """Lightning stops above the threshold, not at it."""
    (stopping,) = (item["init_args"] for item in METHODS[name]["trainer"]["callbacks"])
    assert (stopping["monitor"], stopping["mode"]) == ("val/guided_accuracy", "max")
    assert 0.99 < stopping["stopping_threshold"] < 1
