import json
import re

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from tests.tiny_clip import tiny_aesthetic_head, tiny_clip
from tokenlearn.errors import UserError
from tokenlearn.models.aesthetic import AestheticHead, build_aesthetic_head, save_aesthetic_head
from tokenlearn.models.clip import ClipModel

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of a CLIP and of two heads that name it."""
    folder = tmp_path_factory.mktemp("models")
    tiny_clip(folder / "clip")
    tiny_aesthetic_head(folder / "head", "../clip")
    tiny_aesthetic_head(folder / "linear", str(folder / "clip"), hidden_sizes=())
    return folder


@pytest.fixture(scope="module")
def rater(models):
    return AestheticHead(str(models / "head"))


def test_scores_are_the_heads_of_unit_features(models, rater):
    features = ClipModel(str(models / "clip")).image_features(IMAGES)
    stored = {name: tensor.float() for name, tensor in load_file(models / "head" / "model.safetensors").items()}
    hidden = functional.gelu(functional.linear(features, stored["0.weight"], stored["0.bias"]))
    expected = functional.linear(hidden, stored["2.weight"], stored["2.bias"])[:, 0]
    torch.testing.assert_close(rater.score(IMAGES), expected)
    torch.testing.assert_close(rater(IMAGES), expected)


def test_stored_in_half_precision_and_loaded_as_float32(models, rater):
    assert {tensor.dtype for tensor in load_file(models / "head" / "model.safetensors").values()} == {torch.float16}
    assert {parameter.dtype for parameter in rater.parameters()} == {torch.float32}


def test_the_clip_is_found_from_elsewhere(models, rater, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.testing.assert_close(AestheticHead(str(models / "head")).score(IMAGES), rater.score(IMAGES))
    monkeypatch.chdir(models)
    assert AestheticHead("linear", clip="clip").clip.pretrained == "clip"
    assert AestheticHead("linear").clip.pretrained == str(models / "clip")


def test_saving_leaves_the_head_as_it_was(tmp_path):
    head = build_aesthetic_head(8)
    save_aesthetic_head(head, tmp_path, "owner/clip")
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "config.json").read_text())["clip"] == "owner/clip"


def test_linear_heads_as_published_are_a_file(models, tmp_path):
    head = build_aesthetic_head(8)
    torch.save(head.state_dict(), tmp_path / "linear.pth")
    rater = AestheticHead(str(tmp_path / "linear.pth"), clip=str(models / "clip"))
    expected = rater.clip.image_features(IMAGES) @ head.weight[0] + head.bias
    torch.testing.assert_close(rater.score(IMAGES), expected)
    with pytest.raises(UserError, match=r"linear\.pth'.*'clip'"):
        AestheticHead(str(tmp_path / "linear.pth"))


def test_stays_frozen_and_differentiable(rater):
    images = IMAGES.clone().requires_grad_()
    rater.train().score(images).sum().backward()
    assert not any(module.training for module in rater.modules())
    assert (images.grad != 0).any(dim=1).all()
    assert all(parameter.grad is None for parameter in rater.parameters())


def test_a_head_of_another_clip_is_named(models, tmp_path):
    save_aesthetic_head(build_aesthetic_head(9), tmp_path, str(models / "clip"))
    with pytest.raises(UserError, match=r"8 features.*clip'") as caught:
        AestheticHead(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_half_downloaded_folder_names_the_missing_file(tmp_path, missing):
    (tiny_aesthetic_head(tmp_path, "../clip") / missing).unlink()
    with pytest.raises(UserError, match=f"'{missing}'"):
        AestheticHead(str(tmp_path))


def test_bad_files_are_one_line(tmp_path):
    folder = tiny_aesthetic_head(tmp_path / "head", "../clip")
    (folder / "model.safetensors").write_bytes(b"nothing")
    for file in (folder, tmp_path / "text.pth"):
        (tmp_path / "text.pth").write_text("no weights")
        with pytest.raises(UserError, match=re.escape(str(tmp_path))) as caught:
            AestheticHead(str(file))
        assert "\n" not in str(caught.value)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=re.escape(str(folder / "config.json"))):
        AestheticHead(str(folder))
    with pytest.raises(UserError, match="'no/such'"):
        AestheticHead("no/such")


def test_a_missing_clip_is_named(tmp_path):
    with pytest.raises(UserError, match=r"/\.\./clip'"):
        AestheticHead(str(tiny_aesthetic_head(tmp_path / "head", "../clip")))
