"""Classifiers from files that users have: weights, checkpoints of other programs, pickled models."""

import argparse
import json
import os

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from tests.tiny import tiny_classifier
from tokenlearn.errors import UserError
from tokenlearn.main import main
from tokenlearn.models.classifier import TimmClassifier
from tokenlearn.objectives import ClassifierLoss

NAMES = ["red shirt", "blue shirt", "none"]
OWN = {"label_names": NAMES, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [32, 32], "crop_pct": 1.0}


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return timm.create_model("test_resnet", num_classes=len(NAMES)).eval()


@pytest.fixture(scope="module")
def other():
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return timm.create_model("test_resnet", num_classes=len(NAMES)).eval()


def prefixed(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def expected_logits(model, images):
    mean, std = (torch.tensor(OWN[name]).reshape(1, 3, 1, 1) for name in ("mean", "std"))
    return model((images - mean) / std)


def checkpoints(model, other):
    state = model.state_dict()
    trained_by_timm = {
        "epoch": 3,
        "arch": "test_resnet",
        "state_dict": prefixed(other.state_dict(), "module."),
        "state_dict_ema": prefixed(state, "module."),
        "args": argparse.Namespace(model="test_resnet", mean=OWN["mean"], std=OWN["std"], img_size=32, crop_pct=1.0),
        "metric": 91.2,
    }
    lightning = {
        "state_dict": prefixed(state, "net.") | {"loss.weight": torch.ones(3)},
        "hyper_parameters": {"lr": 0.1},
        "callbacks": {},
    }
    named = {"architecture": "test_resnet"} | OWN
    return {
        "weights.pth": (state, named),
        "compiled.pt": (prefixed(prefixed(state, "module."), "_orig_mod."), named),
        "model_best.pth.tar": (trained_by_timm, {"label_names": NAMES}),
        "lightning.ckpt": (lightning, named),
        "whole.pth": (model, OWN),
        "data_parallel.pth": (nn.DataParallel(model), OWN),
        "inside.pth": ({"model": model, "epoch": 2}, OWN),
    }


@pytest.mark.parametrize("name", checkpoints(nn.Identity(), nn.Identity()))
def test_files_give_the_model_that_was_saved(tmp_path, model, other, name):
    content, settings = checkpoints(model, other)[name]
    torch.save(content, tmp_path / name)
    classifier = TimmClassifier(str(tmp_path / name), **settings)
    assert classifier.label_names == tuple(NAMES)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(classifier(images), expected_logits(model, images))
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_safetensors_and_a_folder_with_a_lone_file(tmp_path, model):
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    images = torch.rand(2, 3, 32, 32)
    for path in (tmp_path / "weights.safetensors", tmp_path):
        classifier = TimmClassifier(str(path), architecture="test_resnet", **OWN)
        torch.testing.assert_close(classifier(images), expected_logits(model, images))


def test_settings_replace_those_of_a_folder(tmp_path):
    folder = str(tiny_classifier(tmp_path, NAMES))
    classifier = TimmClassifier(folder, label_names={1: "jeans"}, mean=[0, 0, 0], std=[1, 1, 1], input_size=16)
    assert classifier.label_names == ("red shirt", "jeans", "none")
    assert classifier.label_index("jeans") == 1
    images = torch.rand(1, 3, 16, 16)
    assert classifier.preprocess(images).shape == (1, 3, 16, 16)
    assert classifier.mean.flatten().tolist() == [0, 0, 0]


def test_nothing_in_a_pickle_is_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))  # makes a file where it is run

    for number, content in enumerate((Harm(), {"state_dict": Harm()}, {"fc.weight": Harm(), "args": Harm()})):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        with pytest.raises(UserError, match=r"torch\.save\(model\.state_dict\(\)") as caught:
            TimmClassifier(str(path), architecture="test_resnet")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


def test_pickles_of_the_system_are_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return (os.system, ("true",))

    for old in (False, True):
        torch.save({"state_dict": Harm()}, tmp_path / "harm.pth", _use_new_zipfile_serialization=not old)
        with pytest.raises(UserError, match=r"save the weights by torch\.save"):
            TimmClassifier(str(tmp_path / "harm.pth"), architecture="test_resnet")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "set architecture"),
        ({"architecture": "test_resnett"}, r"architecture 'test_resnett'.*did you mean test_resnet"),
        ({"architecture": "test_vit"}, r"no last layer 'head' of test_vit"),
        ({"architecture": "resnet10t"}, r"not of resnet10t: .*shape"),
        (
            {"architecture": "test_resnet", "label_names": ["a"]},
            r"3 outputs but 1 label names; correct 'label_names'$",
        ),
        ({"architecture": "test_resnet", "label_names": {3: "a"}}, r"label_names has class 3.*3 classes"),
        ({"architecture": "test_resnet", "mean": [0.5]}, r"mean has 1 numbers"),
        ({"architecture": "test_resnet", "std": [1, 1, 0]}, r"std above 0"),
        ({"architecture": "test_resnet", "input_size": [0, 3]}, r"input_size .*got \[0, 3\]"),
        ({"architecture": "test_resnet", "crop_pct": 2}, r"crop_pct .*got 2"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, model, settings, message):
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message) as caught:
        TimmClassifier(str(tmp_path / "weights.pth"), **settings)
    assert "\n" not in str(caught.value)


def test_damaged_files_and_a_superfluous_architecture(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    whole = (tmp_path / "weights.pth").read_bytes()
    for name in ("weights.pth", "weights.safetensors"):
        (tmp_path / name).write_bytes(whole[:1000])
        with pytest.raises(UserError, match=r"cannot read the weights"):
            TimmClassifier(str(tmp_path / name), architecture="test_resnet")
    folder = tiny_classifier(tmp_path / "folder", NAMES)
    with pytest.raises(UserError, match=r"says its own; remove it"):
        TimmClassifier(str(folder), architecture="test_resnet")


def test_classes_by_index(tmp_path):
    classifier = TimmClassifier(str(tiny_classifier(tmp_path, NAMES)))
    assert [classifier.label_index(name) for name in (2, "2", "none")] == [2, 2, 2]
    for wrong in (3, "3", -1):
        with pytest.raises(UserError, match=r"has no class -?\d; its 3 classes"):
            classifier.label_index(wrong)
    images = torch.rand(4, 3, 32, 32)
    by_index, by_name = (ClassifierLoss(classifier, labels=label)(images) for label in (1, "blue shirt"))
    assert torch.equal(by_index, by_name)


def test_a_named_digit_is_a_name(tmp_path):
    assert TimmClassifier(str(tiny_classifier(tmp_path, ["7", "0"]))).label_index("0") == 1


def test_a_file_of_weights_in_a_config(tiny_config, tmp_path):
    model = timm.create_model("test_resnet", num_classes=2)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    own = {
        "class_path": "TimmClassifier",
        "init_args": {
            "pretrained": str(tmp_path / "mine.pth"),
            "architecture": "test_resnet",
            "label_names": {0: "wizard", 1: "pirate"},
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "input_size": 32,
        },
    }
    changes = {"model.init_args.objective.init_args.classifier": own, "trainer.max_steps": 1}
    main(["fit", "--config", tiny_config(changes)])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "judged_accuracy_after" in summary
