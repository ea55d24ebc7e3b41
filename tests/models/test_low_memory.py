"""Loading and decoding where memory is short."""

import functools

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from tests.tiny import tiny_pipeline
from tokenlearn.errors import UserError
from tokenlearn.models import StableDiffusion
from tokenlearn.models.backbones import latent_diffusion, loading
from tokenlearn.pipeline import Pipeline, Sampling, load_backbone
from tokenlearn.token_task import TokenTask


@pytest.fixture(scope="module")
def backbone(tiny_models):
    return StableDiffusion(str(tiny_models / "pipeline"))


def sizes_of_calls(module):
    sizes = []
    hook = module.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    return sizes, hook


@pytest.mark.parametrize(("pixels", "expected"), [(16 * 16, [1] * 5), (2 * 16 * 16 + 1, [2, 2, 1]), (512 * 512, [5])])
def test_the_vae_takes_images_in_slices(backbone, monkeypatch, pixels, expected):
    latents = backbone.initial_latents(range(5)).requires_grad_()
    whole = backbone.decode_latents(latents)
    (gradient_of_whole,) = torch.autograd.grad(whole.square().sum(), latents)
    monkeypatch.setattr(latent_diffusion, "_SLICE_PIXELS", pixels)
    decoded, decoder = sizes_of_calls(backbone.vae.decoder)
    encoded, encoder = sizes_of_calls(backbone.vae.encoder)
    images = backbone.decode_latents(latents)
    (gradient,) = torch.autograd.grad(images.square().sum(), latents)
    again = backbone.encode_images(images.detach().clamp(0, 1))
    decoder.remove()
    encoder.remove()
    assert decoded == encoded == expected
    assert again.shape == latents.shape
    torch.testing.assert_close(images, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, gradient_of_whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("in_place", [True, False])
def test_networks_are_loaded_without_a_second_set_of_weights(tiny_models, backbone, monkeypatch, in_place):
    if in_place:
        pytest.importorskip("accelerate")
    devices = {}

    def watch(cls):
        original = cls.__init__

        @functools.wraps(original)
        def make(self, *args, **kwargs):
            original(self, *args, **kwargs)
            devices[cls] = {parameter.device.type for parameter in self.parameters()}

        monkeypatch.setattr(cls, "__init__", make)

    monkeypatch.setattr(loading, "_IN_PLACE", in_place)
    for cls in (UNet2DConditionModel, AutoencoderKL):
        watch(cls)
    found = StableDiffusion(str(tiny_models / "pipeline"))
    expected = {"meta"} if in_place else {"cpu"}  # meta has no memory
    assert devices == {UNet2DConditionModel: expected, AutoencoderKL: expected}
    for ours, theirs in zip(found.parameters(), backbone.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def halved(folder, keep=()):
    """A pipeline whose weights are files of the variant fp16 alone, but for those of some components."""
    tiny_pipeline(folder)
    for name in ("unet", "vae", "text_encoder"):
        for file in [] if name in keep else (folder / name).glob("*.safetensors"):
            file.rename(file.with_suffix(".fp16.safetensors"))
    return folder


@pytest.mark.parametrize("keep", [(), ("vae",)])
def test_a_folder_with_half_precision_alone_needs_no_variant(tmp_path, backbone, keep):
    found = StableDiffusion(str(halved(tmp_path, keep)))
    for ours, theirs in zip(found.parameters(), backbone.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_plain_files_come_first(tmp_path, backbone):
    folder = tiny_pipeline(tmp_path)
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    assert len(list(StableDiffusion(str(folder)).parameters())) == len(list(backbone.parameters()))


@pytest.mark.parametrize("load", [StableDiffusion, load_backbone])
@pytest.mark.parametrize("name", ["dreamshaper_8.safetensors", "models/anything.CKPT"])
def test_a_checkpoint_in_one_file_is_named_as_such(tmp_path, load, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    with pytest.raises(UserError, match=r"single file.*from_single_file\('.*'\)\.save_pretrained.* folder"):
        load(str(file))


@pytest.mark.parametrize(("size", "expected"), [(None, 16), ((32, 32), 32)])
def test_images_of_data_have_the_size_of_sampling(backbone, size, expected):
    assert TokenTask(backbone, Sampling(size=size)).image_size == expected


def test_images_of_data_are_square(backbone):
    with pytest.raises(UserError, match=r"model\.sampling\.size 32x16 .*data\.images\.size"):
        _ = TokenTask(backbone, Sampling(size=(32, 16))).image_size


@torch.no_grad()
def test_images_are_generated_at_the_size_of_sampling(backbone):
    pipeline = Pipeline(backbone, sampling=Sampling(2, 1.0, size=(8, 24)))
    assert pipeline.generate(["a king"], [0]).shape == (1, 3, 8, 24)
