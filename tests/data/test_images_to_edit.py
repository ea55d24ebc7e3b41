import numpy as np
import pytest
import torch
from PIL import Image

from tokenlearn.data.images_to_edit import FolderImages, GeneratedImages
from tokenlearn.errors import UserError


def save(path, size=(24, 20), color=(10, 100, 200), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def test_all_images_in_any_depth_are_named_by_their_paths(tmp_path):
    for name in ("b.png", "deeper/still/a.jpg", "deeper/C.PNG", ".hidden.png", ".thumbnails/a.png", "deeper/b.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "print.pdf").write_text("nor can this be read as one")
    images = FolderImages(str(tmp_path), 16, 4)
    assert images.names == ["b", "deeper/C", "deeper/b", "deeper/still/a"]
    assert [images[index].name for index in range(4)] == images.names


def test_an_extension_stays_where_it_tells_two_apart(tmp_path):
    for name in ("a.png", "A.jpg", "b.jpg", "a.b.png"):
        save(tmp_path / name)
    assert FolderImages(str(tmp_path), 16, 4).names == ["A.jpg", "a.b", "a.png", "b"]


@pytest.mark.parametrize(
    ("size", "expected"), [((40, 40), (16, 16)), ((40, 20), (32, 16)), ((5, 9), (16, 28)), ((5, 40), (16, 128))]
)
def test_images_come_near_the_size_of_the_model(tmp_path, size, expected):
    save(tmp_path / "a.png", size)
    image = FolderImages(str(tmp_path), 16, 4)[0]
    assert image.size == size
    assert image.image.shape == (1, 3, *reversed(expected))
    torch.testing.assert_close(image.image[0, :, 3, 3], torch.tensor([10, 100, 200]) / 255)


def test_one_file(tmp_path):
    images = FolderImages(str(save(tmp_path / "folder" / "me.jpg")), 16, 4)
    assert images.names == ["me"]
    assert images[0].size == (24, 20)


def test_images_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255  # left becomes top
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = FolderImages(str(tmp_path), 8, 4)[0]
    assert image.size == (8, 16)
    assert image.image[0, 0, :6].min() == 1
    assert image.image[0, 0, 10:].max() == 0


def test_errors_name_the_folder_or_the_file(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        FolderImages(str(tmp_path / "nowhere"), 16, 4)
    with pytest.raises(UserError, match=tmp_path.name):
        FolderImages(str(tmp_path), 16, 4)
    save(tmp_path / "whole.png", (200, 200))
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    (tmp_path / "words.jpg").write_text("not an image")
    images = FolderImages(str(tmp_path), 16, 4)
    for index, name in ((0, "cut.png"), (2, "words.jpg")):
        with pytest.raises(UserError, match=rf"{name}' \(.+\)") as raised:
            images[index]
        assert "\n" not in str(raised.value)
    assert images[1].name == "whole"


def test_generated_images_are_every_prompt_with_every_seed():
    images = GeneratedImages(["A man, smiling!", "a man smiling"], [7, 2], 64)
    assert images.names == [f"{n}-a-man-smiling-seed{seed}" for n in ("000", "001") for seed in (7, 2)]
    image = images[3]
    assert (image.name, image.prompt, image.seed) == (images.names[3], "a man smiling", 2)
    assert (image.image, image.size) == (None, (64, 64))
    with pytest.raises(UserError, match=r"model\.seeds"):
        GeneratedImages(["a man"], [], 64)


def test_images_in_memory_equal_their_files(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.png", (24, 20), exif=exif)
    save(tmp_path / "b.png", (40, 20))
    given = [Image.open(tmp_path / name) for name in ("a.png", "b.png")]
    files, memory = FolderImages(str(tmp_path), 16, 4), FolderImages(given, 16, 4)
    assert memory.names == ["image-000", "image-001"]
    for index in range(2):
        assert torch.equal(memory[index].image, files[index].image)
        assert memory[index].size == files[index].size
    assert FolderImages(given[1], 16, 4).names == ["image-000"]
    assert FolderImages(tmp_path / "b.png", 16, 4).names == ["b"]
    with pytest.raises(UserError):
        FolderImages([], 16, 4)


def test_generated_images_of_any_size():
    assert GeneratedImages(["a man"], [0], (96, 64))[0].size == (96, 64)
    with pytest.raises(UserError, match=r"model\.prompts"):
        GeneratedImages([], [0], 64)
