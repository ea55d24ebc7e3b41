import numpy as np
import pytest
import torch
from PIL import Image

from tokenlearn.data.pixels import read_image, square_pixels, to_rgb, unit_range
from tokenlearn.data.portraits import portrait


def test_every_mode_becomes_rgb():
    solid = (40, 100, 200)
    assert to_rgb(Image.new("RGB", (2, 2), solid)).getpixel((0, 0)) == solid
    assert to_rgb(Image.new("RGBA", (2, 2), (*solid, 255))).getpixel((0, 0)) == solid
    assert to_rgb(Image.new("RGBA", (2, 2), (*solid, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("LA", (2, 2), (10, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("L", (2, 2), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert to_rgb(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("CMYK", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((2, 2), 77 * 256, dtype=np.uint16))
    assert to_rgb(deep).getpixel((0, 0)) == (77, 77, 77)
    palette = Image.new("P", (2, 2), 0)
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_images_are_cropped_in_the_middle_and_not_squeezed():
    wide = Image.new("RGB", (60, 20), "black")
    wide.paste("red", (20, 0, 40, 20))
    assert (square_pixels(wide, 20) == torch.tensor([255, 0, 0])).all()
    small = square_pixels(wide.rotate(90, expand=True), 10)  # resizing mixes neighbours into the outermost pixels
    assert (small[2:-2, 2:-2] == torch.tensor([255, 0, 0])).all()
    unchanged = portrait(0, 0)[1]
    assert np.array_equal(square_pixels(unchanged, 64), np.asarray(unchanged))


def test_pixels_become_images_in_the_unit_range():
    pixels = [torch.full((4, 6, 3), value, dtype=torch.uint8) for value in (0, 51, 255)]
    images = unit_range(pixels)
    assert images.shape == (3, 3, 4, 6)
    assert images[:, 0, 0, 0].tolist() == pytest.approx([0, 0.2, 1])


def test_missing_and_small_images_are_refused(tmp_path):
    Image.new("RGB", (3, 90)).save(tmp_path / "tiny.png")
    encoded = {"bytes": None, "path": str(tmp_path / "tiny.png")}
    assert read_image(encoded).size == (3, 90)
    with pytest.raises(ValueError, match=r"3x90 .* 16"):
        read_image(encoded, 16)
    with pytest.raises(ValueError, match="no image"):
        read_image(None)
