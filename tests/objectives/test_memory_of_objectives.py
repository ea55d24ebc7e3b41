"""What the backward pass of an objective holds, and in which precision its model works."""

import pytest
import torch

from tests.tiny_clip import tiny_aesthetic_head, tiny_clip
from tokenlearn.losses.objective import Crops
from tokenlearn.models.clip import ClipModel
from tokenlearn.objectives import AestheticLoss, ClassifierLoss, CLIPTextLoss

DEVICE = "cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objectives")
    tiny_clip(folder / "clip")
    tiny_aesthetic_head(folder / "head", "../clip")
    return folder


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)


def held(function, module):
    """Result of a forward pass, and the bytes that it holds for its backward pass besides the module's parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return result, sum(storages.values())


def test_crops_hold_the_memory_of_none(folder, images):
    clip = ClipModel(str(folder / "clip"))
    found = {}
    for number in (2, 16):
        for checkpointing in (True, False):
            loss = CLIPTextLoss(clip, "a king", crops=Crops(number, 0.5, checkpointing=checkpointing))
            losses, memory = held(lambda loss=loss: loss(images, 3), clip)
            (gradient,) = torch.autograd.grad(losses.sum(), images)
            found[number, checkpointing] = losses.detach(), gradient, memory
        torch.testing.assert_close(found[number, True][:2], found[number, False][:2], rtol=1e-5, atol=1e-7)
    stored = found[16, False][2] - found[2, False][2]
    recomputed = found[16, True][2] - found[2, True][2]
    assert recomputed < 0.05 * stored


def test_frozen_weights_in_the_precision_of_autocast_are_not_copied(folder, images):
    """Autocast copies frozen weights for each evaluation, unless they are in its precision."""
    memory = {}
    for dtype in ("float32", "bfloat16"):
        clip = ClipModel(str(folder / "clip"), dtype)
        parameters = sum(parameter.numel() for parameter in clip.model.vision_model.parameters())
        with torch.autocast(DEVICE, torch.bfloat16):
            features, memory[dtype] = held(lambda clip=clip: clip.image_features(images), clip)
        assert features.dtype == torch.float32
        (gradient,) = torch.autograd.grad(features.sum(), images)
        assert gradient.isfinite().all()
    assert memory["float32"] - memory["bfloat16"] > parameters  # two bytes each, of most of them


@pytest.mark.parametrize("kind", ["text", "aesthetic", "class"])
def test_models_in_half_precision_say_about_the_same(folder, tiny_models, images, kind):
    make = {
        "text": lambda dtype: CLIPTextLoss(str(folder / "clip"), "a king", dtype=dtype),
        "aesthetic": lambda dtype: AestheticLoss(str(folder / "head"), dtype=dtype),
        "class": lambda dtype: ClassifierLoss(str(tiny_models / "guide"), "pirate", dtype=dtype),
    }[kind]
    whole, half = make("float32"), make("bfloat16")
    assert torch.bfloat16 in {parameter.dtype for parameter in half.parameters()}
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    losses = half(images)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, whole(images), rtol=0.05, atol=0.05)
    (gradient,) = torch.autograd.grad(losses.sum(), images)
    assert gradient.any()
