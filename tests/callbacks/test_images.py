import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from tokenlearn.callbacks.images import save_image, sheet, to_image
from tokenlearn.errors import UserError


def test_to_image_rounds_as_diffusers():
    image = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0))
    image[0, 0] = torch.arange(50) / 255 + 0.5 / 255  # halves
    (reference,) = VaeImageProcessor.numpy_to_pil(image.permute(1, 2, 0).numpy())
    assert np.array_equal(np.asarray(to_image(image)), np.asarray(reference))


def test_to_image_clamps_and_takes_any_precision():
    image = torch.tensor([-0.5, 0.0, 1.0, 1.5], dtype=torch.bfloat16, requires_grad=True).expand(3, 2, 4)
    assert np.asarray(to_image(image))[0, :, 0].tolist() == [0, 0, 255, 255]


def test_to_image_shows_values_that_are_not_finite():
    image = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.2]).expand(3, 2, 4)
    assert np.asarray(to_image(image))[0, :, 0].tolist() == [0, 255, 0, 51]


def test_sheet_places_every_image():
    colors = {"one": ["red", "lime"], "a longer caption": ["blue"]}
    image = sheet([(name, [Image.new("RGB", (40, 20), c) for c in row]) for name, row in colors.items()])
    width, height = 5 * 40, 5 * 20  # the smaller side is enlarged to 96 or more
    margin = image.width - 2 * (width + 4)
    assert image.height == 4 + 2 * (height + 4)
    assert margin > 80
    for row, names in enumerate(colors.values()):
        for column in range(2):
            box = (margin + column * (width + 4), 4 + row * (height + 4))
            area = image.crop((*box, box[0] + width, box[1] + height))
            expected = names[column] if column < len(names) else "white"
            assert area.getcolors() == [(width * height, Image.new("RGB", (1, 1), expected).getpixel((0, 0)))]
    for row in range(2):
        caption = np.asarray(image.crop((0, 4 + row * 104, margin, 104 + row * 104)).convert("L"))
        assert caption.min() < 128


def test_large_images_are_not_enlarged():
    image = sheet([("x", [Image.new("RGB", (128, 96))] * 3)])
    assert image.height == 96 + 8


def test_save_image_leaves_nothing_half_written(tmp_path, monkeypatch):
    path = save_image(Image.new("RGB", (4, 4), "red"), tmp_path / "new" / "image.png")

    def full_disk(self, path, **options):
        path.write_bytes(b"half a")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(UserError, match=r"image.png' \(disk full\); make room"):
        save_image(Image.new("RGB", (4, 4), "blue"), path)
    assert [file.name for file in path.parent.iterdir()] == ["image.png"]
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)
