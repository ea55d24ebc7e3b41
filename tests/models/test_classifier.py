import json
import re

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from tests.tiny import tiny_classifier
from tokenlearn.errors import UserError
from tokenlearn.models.classifier import TimmClassifier, save_classifier

LABELS = ["wizard", "pirate", "chef"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_classifier(tmp_path_factory.mktemp("classifier"), LABELS)


@pytest.fixture(scope="module")
def classifier(folder):
    return TimmClassifier(str(folder))


def waves(height, width):
    """Smooth uint8 images, (2, H, W, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [np.sin(x / (3 + c)) * np.cos(y / (5 + c) + c) for c in range(6)]
    return (
        (127.5 + 120 * np.stack(channels, axis=-1)).astype(np.uint8).reshape(height, width, 2, 3).transpose(2, 0, 1, 3)
    )


@pytest.mark.parametrize("size", [(48, 80), (20, 30)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_equals_timms_own_transform(tmp_path, size, crop_mode, interpolation):
    model = timm.create_model("test_resnet", num_classes=2)
    data_config = {
        "input_size": (3, 32, 32),
        "crop_pct": 0.8,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
        "mean": (0.1, 0.4, 0.5),
        "std": (0.3, 0.2, 0.5),
    }
    classifier = TimmClassifier(str(save_classifier(model, tmp_path, ["a", "b"], data_config=data_config)))
    transform = create_transform(**resolve_model_data_config(classifier.model))
    arrays = waves(*size)
    expected = torch.stack([transform(Image.fromarray(array)) for array in arrays])
    inputs = classifier.preprocess(torch.from_numpy(arrays.copy()).permute(0, 3, 1, 2) / 255)
    assert inputs.shape == (2, 3, 32, 32)
    # Pillow rounds to 8 bits after each of its two passes.
    torch.testing.assert_close(inputs, expected, rtol=0, atol=1.5 / 255 / 0.2)


def test_loads_what_timm_loads_from_half_precision_as_float32(folder, classifier):
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith("weight")} == {torch.float16}
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32}
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(classifier(images), theirs(classifier.preprocess(images)))
    assert torch.equal(TimmClassifier(f"local-dir:{folder}")(images), classifier(images))
    assert classifier.label_names == tuple(LABELS)
    assert classifier.num_classes == 3
    assert not classifier.multi_label


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = timm.create_model("test_resnet", num_classes=2)
    save_classifier(model, tmp_path, ["a", "b"], data_config={"input_size": (3, 32, 32)})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.pretrained_cfg["input_size"] != (3, 32, 32)
    with pytest.raises(ValueError, match="3 label names for a classifier with 2 outputs"):
        save_classifier(model, tmp_path, LABELS)


def test_multi_label_is_stored_in_the_folder(tmp_path):
    classifier = TimmClassifier(str(tiny_classifier(tmp_path, ["hat", "beard"], multi_label=True)))
    assert classifier.multi_label
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).num_classes == 2


def test_head_maps_features_to_logits(classifier):
    images = torch.rand(2, 3, 32, 32)
    features = classifier.features(images)
    assert features.shape == (2, classifier.head_weight.shape[1])
    torch.testing.assert_close(features @ classifier.head_weight.T + classifier.head_bias, classifier(images))


def test_trunk_features_pool_to_features(folder):
    classifier = TimmClassifier(str(folder))
    classifier.preprocess = lambda images: images  # at the full size, for more places than one
    images = torch.rand(2, 3, 128, 96)
    places = classifier.trunk_features(images)
    assert places.shape[::2] == (2, classifier.head_weight.shape[1])
    assert places.shape[1] > 1
    torch.testing.assert_close(places.mean(dim=1), classifier.features(images))


def test_stays_frozen_and_differentiable_inside_of_a_parent_that_trains(classifier):
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    assert any("running_mean" in name for name in before)
    nn.ModuleList([classifier]).train()
    images = torch.rand(2, 3, 40, 40, requires_grad=True)
    classifier(images).square().sum().backward()
    assert images.grad is not None
    assert (images.grad[:, :, 10:30, 10:30] != 0).any(dim=1).all()
    assert all(torch.equal(before[name], tensor) for name, tensor in classifier.state_dict().items())
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_labels_by_name(classifier):
    assert [classifier.label_index(name) for name in ("pirate", "Pirate")] == [1, 1]
    with pytest.raises(UserError, match=r"'wizzard'.*'wizard'"):
        classifier.label_index("wizzard")
    with pytest.raises(UserError, match=r"'zzz'.*wizard, pirate, chef"):
        classifier.label_index("zzz")


def test_imagenet_classes_by_their_words(monkeypatch):
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create_model(name, num_classes=1000))
    classifier = TimmClassifier("test_resnet")
    assert classifier.label_names[282] == "tiger cat"
    assert len(set(classifier.label_names)) == 1000
    for name in ("tiger cat", "Tiger_Cat", "n02123159"):
        assert classifier.label_index(name) == 282
    with pytest.raises(UserError, match=r"'crane'.*'crane \(n02012849\)', 'crane \(n03126707\)'"):
        classifier.label_index("crane")
    assert classifier.label_index("crane (n03126707)") == 517


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_half_downloaded_folder_names_the_missing_file(tmp_path, missing):
    (tiny_classifier(tmp_path, LABELS) / missing).unlink()
    with pytest.raises(UserError, match=f"'{missing}'"):
        TimmClassifier(str(tmp_path))


def test_unreadable_folders_are_one_line(tmp_path):
    weights = tiny_classifier(tmp_path, LABELS) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=re.escape(str(tmp_path))) as caught:
        TimmClassifier(str(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"architecture": ')
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        TimmClassifier(str(tmp_path))


def test_wrong_number_of_labels_is_named(tmp_path):
    file = tiny_classifier(tmp_path, LABELS) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"label_names": ["wizard"]}))
    with pytest.raises(UserError, match=r"3 outputs.* 1 label names"):
        TimmClassifier(str(tmp_path))


def test_unknown_names_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="'no/such'"):
        TimmClassifier("no/such")
    with pytest.raises(UserError, match=r"'resnet10tt'.*resnet10t\b"):
        TimmClassifier("resnet10tt")
    with pytest.raises(UserError, match=r"'resnet18\.nonsense'"):
        TimmClassifier("resnet18.nonsense")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("resnet10t", "hf-hub:nobody/nothing"):
        with pytest.raises(UserError, match=f"'{name}'.*hub") as caught:
            TimmClassifier(name)
        assert "\n" not in str(caught.value)
