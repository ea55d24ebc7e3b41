import math
import random

import pytest
import torch
from PIL import Image
from torch.nn import functional

from tests.tiny_clip import tiny_aesthetic_head, tiny_clip
from tokenlearn.errors import UserError
from tokenlearn.methods.image_guidance import (
    AestheticGuidance,
    ClassGuidance,
    ClipImageGuidance,
    ClipTextGuidance,
    ImageGuidance,
    SymmetryGuidance,
    random_crops,
)
from tokenlearn.models import TimmClassifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIP and aesthetic head, and two pictures."""
    folder = tmp_path_factory.mktemp("guidance")
    tiny_clip(folder / "clip")
    tiny_aesthetic_head(folder / "head", "../clip")
    Image.new("RGB", (24, 20), (250, 20, 30)).save(folder / "red.png")
    Image.new("L", (16, 18), 40).save(folder / "grey.png")
    return folder


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def guidances(folder, tiny_models):
    clip = str(folder / "clip")
    return {
        "class": ClassGuidance(str(tiny_models / "guide"), "pirate"),
        "text": ClipTextGuidance(clip, "a king"),
        "images": ClipImageGuidance(clip, [str(folder / "red.png"), str(folder / "grey.png")]),
        "aesthetic": AestheticGuidance(str(folder / "head")),
        "target": AestheticGuidance(str(folder / "head"), target=3.0),
        "symmetry": SymmetryGuidance(),
    }


def test_each_has_a_loss_per_picture_and_a_gradient(folder, tiny_models, images):
    for name, guidance in guidances(folder, tiny_models).items():
        guidance.train()  # frozen means frozen
        assert not any(module.training for module in guidance.modules())
        assert not any(parameter.requires_grad for parameter in guidance.parameters())
        leaf = images.clone().requires_grad_()
        losses = guidance(leaf)
        assert losses.shape == (3,)
        one_by_one = torch.cat([guidance(image[None]) for image in images])
        torch.testing.assert_close(losses.detach(), one_by_one, rtol=1e-4, atol=1e-5)
        (gradient,) = torch.autograd.grad(losses[1], leaf)
        assert gradient[1].abs().max() > 0, name
        assert not gradient[[0, 2]].any()


def test_losses_are_those_of_the_models(folder, tiny_models, images):
    made = guidances(folder, tiny_models)
    classifier = TimmClassifier(str(tiny_models / "guide"))
    torch.testing.assert_close(made["class"](images), -classifier(images).log_softmax(dim=1)[:, 2])
    clip = made["text"].clip
    features = clip.image_features(images)
    angles = (features @ clip.text_features(["a king"])[0]).acos()
    torch.testing.assert_close(made["text"](images), angles.square() / 2, rtol=1e-3, atol=1e-4)
    pictures = [
        torch.tensor([250, 20, 30]).reshape(1, 3, 1, 1).expand(1, 3, 20, 24) / 255,
        torch.full((1, 3, 18, 16), 40 / 255),
    ]
    target = functional.normalize(sum(clip.image_features(picture)[0] for picture in pictures), dim=0)
    torch.testing.assert_close(made["images"](images), (features @ target).acos().square() / 2, rtol=1e-3, atol=1e-4)
    scores = made["aesthetic"].head(images)
    torch.testing.assert_close(made["aesthetic"](images), -scores)
    torch.testing.assert_close(made["target"](images), (scores - 3.0).abs())
    mirrored = torch.cat([images, images.flip(-1)], dim=-1)
    assert SymmetryGuidance()(mirrored).max() < 1e-12


def test_weights_multiply(images):
    torch.testing.assert_close(SymmetryGuidance(weight=-2.5)(images), -2.5 * SymmetryGuidance()(images))


class Mean(ImageGuidance):
    """A loss that tells which part of a picture it was given."""

    def loss(self, images):
        return images.flatten(1).mean(dim=1)


def test_crops_are_averaged_and_named_by_seed_and_step(images):
    guidance = Mean(crops=4, smallest_crop=0.25, crop_seed=7)
    losses = guidance(images, 2)
    views = random_crops(images, 4, 0.25, random.Random("7 2"))
    each = torch.stack([view.flatten(1).mean(dim=1) for view in views])
    torch.testing.assert_close(losses, each.mean(dim=0))
    assert (losses > each.min(dim=0).values).all()
    torch.testing.assert_close(guidance(images, 2), losses)  # whatever was asked before
    torch.testing.assert_close(guidance(images[1:2], 2), losses[1:2])
    assert not torch.allclose(guidance(images, 3), losses)
    assert not torch.allclose(Mean(crops=4, smallest_crop=0.25, crop_seed=8)(images, 2), losses)
    torch.testing.assert_close(Mean()(images, 2), images.flatten(1).mean(dim=1))


def test_crops_cover_all_sizes_and_places():
    # Each pixel is its own number, so that a crop's corners tell where it was.
    picture = torch.arange(20 * 10.0).reshape(1, 1, 20, 10)
    views = random_crops(picture, 500, 0.3, random.Random(0))
    assert {view.shape[3] for view in views} == set(range(3, 11))
    assert all(abs(view.shape[2] - 2 * view.shape[3]) <= 1 for view in views)
    corners = [divmod(int(view[0, 0, 0, 0]), 10) for view in views]
    assert {left for _, left in corners} == set(range(8))
    assert max(top for top, _ in corners) >= 13
    assert any(view[0, 0, -1, -1] == 199 for view in views if view.shape[3] < 10)


def test_bad_settings(folder, tiny_models, tmp_path):
    guide, clip = str(tiny_models / "guide"), str(folder / "clip")
    (tmp_path / "broken.png").write_text("not a picture")
    for make, words in (
        (lambda: ClassGuidance(guide, "pirat"), "has no class 'pirat'; did you mean 'pirate'"),
        (lambda: ClassGuidance(str(tmp_path / "no" / "such"), "pirate"), "does not exist"),
        (lambda: ClipTextGuidance(clip, " "), "text of ClipTextGuidance is empty"),
        (lambda: ClipImageGuidance(clip, []), "images of ClipImageGuidance is empty"),
        (lambda: ClipImageGuidance(clip, [str(tmp_path / "broken.png")]), "broken.png' of ClipImageGuidance"),
        (lambda: ClipImageGuidance(clip, [str(tmp_path / "none.png")]), "none.png' of ClipImageGuidance"),
        (lambda: AestheticGuidance(str(folder / "head"), target=math.nan), "target of AestheticGuidance"),
        (lambda: SymmetryGuidance(weight=math.inf), "weight of SymmetryGuidance"),
        (lambda: Mean(crops=-1), "Mean.crops must be at least 0, got -1"),
        (lambda: Mean(smallest_crop=0.0), "smallest_crop must be above 0 and at most 1, got 0"),
    ):
        with pytest.raises(UserError, match=words) as raised:
            make()
        assert "\n" not in str(raised.value)
