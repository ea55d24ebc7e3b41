import numpy as np
import pytest
import torch
from PIL import Image

from tokenlearn.data.pictures import FolderPictures, GeneratedPictures
from tokenlearn.errors import UserError


def save(path, size=(24, 20), color=(10, 100, 200), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def test_all_pictures_in_any_depth_are_named_by_their_paths(tmp_path):
    for name in ("b.png", "deeper/still/a.jpg", "deeper/C.PNG", ".hidden.png", ".thumbnails/a.png", "deeper/b.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "print.pdf").write_text("nor can this be read as one")
    pictures = FolderPictures(str(tmp_path), 16, 4)
    assert pictures.names == ["b", "deeper/C", "deeper/b", "deeper/still/a"]
    assert [pictures[index].name for index in range(4)] == pictures.names


def test_an_extension_stays_where_it_tells_two_apart(tmp_path):
    for name in ("a.png", "A.jpg", "b.jpg", "a.b.png"):
        save(tmp_path / name)
    assert FolderPictures(str(tmp_path), 16, 4).names == ["A.jpg", "a.b", "a.png", "b"]


@pytest.mark.parametrize(
    ("size", "expected"), [((40, 40), (16, 16)), ((40, 20), (32, 16)), ((5, 9), (16, 28)), ((3, 90), (16, 480))]
)
def test_pictures_come_near_the_size_of_the_model(tmp_path, size, expected):
    save(tmp_path / "a.png", size)
    picture = FolderPictures(str(tmp_path), 16, 4)[0]
    assert picture.size == size
    assert picture.image.shape == (1, 3, *reversed(expected))
    torch.testing.assert_close(picture.image[0, :, 3, 3], torch.tensor([10, 100, 200]) / 255)


def test_one_file(tmp_path):
    pictures = FolderPictures(str(save(tmp_path / "folder" / "me.jpg")), 16, 4)
    assert pictures.names == ["me"]
    assert pictures[0].size == (24, 20)


def test_pictures_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255  # left becomes top
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    picture = FolderPictures(str(tmp_path), 8, 4)[0]
    assert picture.size == (8, 16)
    assert picture.image[0, 0, :6].min() == 1
    assert picture.image[0, 0, 10:].max() == 0


def test_errors_name_the_folder_or_the_picture(tmp_path):
    with pytest.raises(UserError, match=r"nowhere' does not exist; name a folder"):
        FolderPictures(str(tmp_path / "nowhere"), 16, 4)
    with pytest.raises(UserError, match=r"has no pictures; put PNG or JPEG files there"):
        FolderPictures(str(tmp_path), 16, 4)
    save(tmp_path / "whole.png", (200, 200))
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    (tmp_path / "words.jpg").write_text("not a picture")
    pictures = FolderPictures(str(tmp_path), 16, 4)
    for index, name in ((0, "cut.png"), (2, "words.jpg")):
        with pytest.raises(UserError, match=rf"cannot read picture '.*{name}' \(.+\); remove or replace it") as raised:
            pictures[index]
        assert "\n" not in str(raised.value)
    assert pictures[1].name == "whole"


def test_generated_pictures_are_every_prompt_with_every_seed():
    pictures = GeneratedPictures(["A man, smiling!", "a man smiling"], [7, 2], 64)
    assert pictures.names == [f"{n}-a-man-smiling-seed{seed}" for n in ("000", "001") for seed in (7, 2)]
    picture = pictures[3]
    assert (picture.name, picture.prompt, picture.seed) == (pictures.names[3], "a man smiling", 2)
    assert (picture.image, picture.size) == (None, (64, 64))
    with pytest.raises(UserError, match=r"model.seeds is empty"):
        GeneratedPictures(["a man"], [], 64)
