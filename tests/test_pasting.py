import pytest
import torch
from PIL import Image

from tokenlearn.data.images_to_edit import FolderImages
from tokenlearn.editing import Editing
from tokenlearn.errors import UserError
from tokenlearn.generation import Edit, Sega
from tokenlearn.guidance import SEGA, SemanticEdit
from tokenlearn.pasting import is_pasted, paste_difference, pasted_image
from tokenlearn.pipeline import Pipeline

SETTINGS = {"inversion": "ddim", "steps": 4, "timestep": 501}


@pytest.fixture(scope="module")
def pipe(tiny_models):
    return Pipeline.from_pretrained(str(tiny_models / "pipeline"))


def noise(size, seed=0):
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy())


def test_the_difference_is_enlarged_added_and_cut_off():
    original = torch.full((1, 3, 8, 12), 0.5)
    original[..., 0] = 0.9
    edited, unedited = torch.full((1, 3, 4, 6), 0.6), torch.full((1, 3, 4, 6), 0.4)
    found = paste_difference(original, edited, unedited)
    torch.testing.assert_close(found[..., 1:], torch.full((1, 3, 8, 11), 0.7))
    assert (found[..., 0] == 1).all()
    # A ramp stays a ramp: the enlarged difference is at the same place as the model's pixels.
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 4, 64)
    found = paste_difference(torch.zeros(1, 3, 8, 128), ramp, torch.zeros_like(ramp))
    expected = (torch.arange(128) + 0.5) / 2 - 0.5
    torch.testing.assert_close(found[0, 0, 0, 8:-8], expected[8:-8] / 63)
    same = torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(paste_difference(same, edited[..., :1, :1] * 0, edited[..., :1, :1] * 0), same)


def test_which_images_are_pasted_onto():
    assert is_pasted("larger", (1200, 800), (96, 64))
    assert not is_pasted("larger", (96, 64), (96, 64))
    assert not is_pasted("larger", (48, 32), (96, 64))
    assert is_pasted("always", (48, 32), (96, 64))
    assert not is_pasted("never", (1200, 800), (96, 64))


def test_strength_0_returns_every_pixel_of_a_large_photo(pipe):
    large = noise((120, 90))
    assert pipe.edit(large, {"hat": 0}, **SETTINGS).tobytes() == large.tobytes()
    assert pipe.edit(large, {}, **SETTINGS).tobytes() == large.tobytes()
    assert pipe.edit(large, {"hat": 0}, paste="never", **SETTINGS).tobytes() != large.tobytes()
    edited = pipe.edit(large, {"hat": 8}, **SETTINGS)
    assert edited.size == large.size
    assert edited.tobytes() not in (large.tobytes(), pipe.edit(large, {"hat": 8}, paste="never", **SETTINGS).tobytes())
    small = noise((16, 16))
    assert pipe.edit(small, {"hat": 0}, paste="always", **SETTINGS).tobytes() == small.tobytes()
    assert (
        pipe.edit(small, {"hat": 8}, **SETTINGS).tobytes()
        == pipe.edit(small, {"hat": 8}, paste="never", **SETTINGS).tobytes()
    )
    with pytest.raises(UserError, match="paste is 'sometimes'"):
        pipe.edit(small, {"hat": 8}, paste="sometimes", **SETTINGS)


def test_the_original_is_upright_and_without_transparency(tmp_path):
    upright = noise((40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = upright.rotate(90, expand=True)
    turned.save(tmp_path / "turned.png", exif=exif)
    see_through = upright.convert("RGBA")
    see_through.putalpha(0)
    see_through.save(tmp_path / "see_through.png")
    see, turn = (FolderImages(tmp_path, 16, 2)[index].original for index in range(2))
    assert turn.size == (40, 30)
    assert turn.tobytes() == upright.tobytes()
    assert see.getextrema() == ((255, 255),) * 3


@torch.no_grad()
def test_tasks_give_what_the_function_gives(pipe, tmp_path):
    noise((60, 40)).save(tmp_path / "photo.png")
    for strength in (8, 0):
        task = Edit(pipe.backbone, images=str(tmp_path), edits=[{"hat": strength}], editing=Editing(**SETTINGS))
        (result,) = task.edit_images([task.images[0]])
        made = pasted_image(result.image.original, result.edits[0], result.unedited)
        assert made.tobytes() == pipe.edit(noise((60, 40)), {"hat": strength}, **SETTINGS).tobytes()
    assert made.tobytes() == noise((60, 40)).tobytes()
    never = Edit(pipe.backbone, images=str(tmp_path), edits=[{"hat": 8}], editing=Editing(**SETTINGS), paste="never")
    assert never.edit_images([never.images[0]])[0].unedited is None

    concepts = [SemanticEdit(concept="hat", scale=8.0, warmup_steps=1)]
    sega = Sega(pipe.backbone, images=str(tmp_path), edits=concepts, editing=Editing(**SETTINGS))
    (result,) = sega.edit_images([sega.images[0]])
    made = pasted_image(result.image.original, result.edits[0], result.unedited)
    assert made.tobytes() == pipe.edit(noise((60, 40)), SEGA(concepts, guidance_scale=1), **SETTINGS).tobytes()


def test_edits_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="not finite"):
        pasted_image(noise((8, 8)), torch.full((3, 4, 4), float("nan")), torch.zeros(3, 4, 4))
